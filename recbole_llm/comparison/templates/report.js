document.querySelectorAll("table.sortable").forEach(function (table) {
  var body = table.tBodies[0];
  if (body.rows.length < 2) return;
  Array.prototype.forEach.call(table.tHead.rows[0].cells, function (head, column) {
    var button = document.createElement("button");
    button.type = "button";
    while (head.firstChild) button.appendChild(head.firstChild);
    head.appendChild(button);
    button.addEventListener("click", function () {
      var up = head.getAttribute("aria-sort") === "descending";
      if (!head.hasAttribute("aria-sort")) up = !head.classList.contains("n");
      Array.prototype.forEach.call(table.tHead.rows[0].cells, function (other) { other.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      var rows = Array.prototype.slice.call(body.rows);
      rows.sort(function (a, b) {
        var x = a.cells[column], y = b.cells[column];
        if (head.classList.contains("n")) {
          var known = (y.dataset.v !== undefined) - (x.dataset.v !== undefined);
          if (known || x.dataset.v === undefined) return known;
          return (up ? 1 : -1) * (x.dataset.v - y.dataset.v);
        }
        return (up ? 1 : -1) * x.textContent.localeCompare(y.textContent);
      });
      rows.forEach(function (row) { body.appendChild(row); });
    });
  });
});
