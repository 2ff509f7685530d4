"use strict";
// Numbers sort as numbers, other text by its letters and digits; cells without a value stay last either way.
document.querySelectorAll("table.sortable").forEach((table) => {
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => row.cells[column].dataset.value;
  const isText = heads.map((head) => head.dataset.sort === "text");
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].sort((first, second) => {
      const a = key(first, column), b = key(second, column);
      if (a === "nan" || b === "nan") return (a === "nan") - (b === "nan");
      return sign * (isText[column] ? a.localeCompare(b, "en", { numeric: true }) : Number(a) - Number(b));
    });
    table.tBodies[0].append(...rows);
  }));
});
