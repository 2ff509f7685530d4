"""`voxfit doctor`: what a machine or a job offers, and one real step of everything."""
