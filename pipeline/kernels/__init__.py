"""Operations of GPUs in Triton, with torch's own beside them wherever Triton does not run."""
