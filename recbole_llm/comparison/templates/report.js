for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  if (body.rows.length < 2) continue;
  heads.forEach((head, column) => {
    const numbers = head.classList.contains("n"), button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.ariaSort ? head.ariaSort === "descending" : !numbers, sign = up ? 1 : -1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => {
        const x = a.cells[column], y = b.cells[column];
        if (!numbers) return sign * x.textContent.localeCompare(y.textContent);
        return ("v" in y.dataset) - ("v" in x.dataset) || sign * (x.dataset.v - y.dataset.v) || 0;
      }));
    });
  });
}
