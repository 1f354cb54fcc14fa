"""Style and script of the page of a comparison. The script only sorts tables; without it the page lacks nothing."""

STYLE = """
:root{--paper:#fff;--soft:#f4f6f8;--ink:#1a1d21;--muted:#59626c;--line:#d4dae0;--accent:#0b63a5;
--c1:#0072b2;--c2:#c04a00;--c3:#00795a;--c4:#a8397f;--c5:#8a6200;--c6:#4b4f56;--heat:#0b5e9e;--on-heat:#fff}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--soft:#1d2228;--ink:#e8eaed;--muted:#a3adb8;--line:#3a424c;
--accent:#7fbdf0;--c1:#5db5f0;--c2:#ff9a57;--c3:#3fd0a2;--c4:#f09ccb;--c5:#e8c441;--c6:#b4bac2;--heat:#7cc4ff;--on-heat:#0c1116}}
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","DejaVu Sans",sans-serif;overflow-wrap:anywhere}
main{max-width:72rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:0}
h2{font-size:1.2rem;margin:2.5rem 0 .5rem;padding-top:1rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:0 0 .5rem}
p{margin:.4rem 0 .8rem;max-width:46rem}
ul,ol{padding-left:1.3rem;margin:.4rem 0}
li{margin:.25rem 0}
sup{line-height:0;font-size:.7em}
small{display:block;color:var(--muted);font-size:.88em;font-weight:400}
.lead,figcaption,.absent,.reasons{color:var(--muted)}
.lead{margin:.2rem 0 1rem}
.absent{font-style:italic}
.reasons,figcaption{font-size:.85rem}
.facts{display:grid;
grid-template-columns:repeat(auto-fill,minmax(min(45%,15rem),1fr));gap:.6rem 1.5rem;margin:0 0 1rem}
dt{color:var(--muted);font-size:.8rem}
dd{margin:0}
pre{background:var(--soft);border-radius:6px;padding:.7rem .9rem;margin:.6rem 0;white-space:pre-wrap;font-size:.85rem;
line-height:1.45;font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
code{font-family:inherit}
li code{font:.82rem ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;color:var(--muted)}
#follows+ul{background:var(--soft);border-left:4px solid var(--accent);border-radius:0 6px 6px 0;
padding:.7rem 1rem .7rem 2rem;max-width:52rem}
#failed+ul{border-left:4px solid var(--c2);padding:.2rem 1rem .2rem 2rem}
.scroll{overflow-x:auto;margin:.6rem 0;border:1px solid var(--line);border-radius:6px}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.45rem .7rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);white-space:nowrap}
tbody tr:last-child>*{border-bottom:0}
thead th{background:var(--soft);font-size:.92em;color:var(--muted);vertical-align:bottom}
.n{text-align:right}
th[scope=row],thead th:first-child{position:sticky;left:0;z-index:1;white-space:normal;overflow-wrap:anywhere;
min-width:9.5rem;max-width:18rem;border-right:1px solid var(--line)}
th[scope=row]{background:var(--paper);font-weight:600}
tbody tr:hover>*{background:var(--soft)}
th button{all:unset;cursor:pointer;white-space:nowrap}
th button::after{content:"\\21C5";opacity:.5;padding-left:.3em;font-weight:400}
th[aria-sort=ascending] button::after{content:"\\25B4";opacity:1}
th[aria-sort=descending] button::after{content:"\\25BE";opacity:1}
.star{color:var(--c2);margin-left:.2em}
:focus-visible,th button:focus-visible{outline:3px solid var(--accent);outline-offset:2px;border-radius:3px}
figure{margin:.5rem 0;max-width:30rem}
figure svg{display:block;width:100%;height:auto}
.wide{display:grid;
grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1.5rem 2rem;align-items:start}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(45%,11rem),1fr));gap:1rem}
.panels figure,.wide figure{min-width:0}
.panels figure{max-width:15rem}
.key{list-style:none;display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;padding:0;margin:.4rem 0;font-size:.85rem}
.key li{margin:0;color:var(--ink);display:flex;gap:.35rem;align-items:baseline}
ol.key li::before{content:attr(value);min-width:1.4em;text-align:right;font-weight:600}
svg.swatch{flex:none;width:.9rem;height:.9rem;align-self:center}
@media (min-width:56rem){.keyed{max-width:none;display:grid;
grid-template-columns:30rem 1fr;gap:0 2rem;align-items:start}
.keyed ol.key{flex-direction:column}}
details{margin:.6rem 0;border:1px solid var(--line);border-radius:6px;padding:.1rem .8rem}
summary{cursor:pointer;padding:.45rem 0;font-weight:600;font-size:.92rem}
svg text{font-size:11px;fill:var(--ink)}
svg text.name{font-weight:600}
svg text.muted,svg text.axis-title{fill:var(--muted)}
svg text.halo{paint-order:stroke;stroke:var(--paper);stroke-width:3px}
svg text.label{font-weight:600}
svg text.on-heat{fill:var(--on-heat)}
.c1{fill:var(--c1)}.c2{fill:var(--c2)}.c3{fill:var(--c3)}.c4{fill:var(--c4)}.c5{fill:var(--c5)}.c6{fill:var(--c6)}
.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}.s3{stroke:var(--c3)}.s4{stroke:var(--c4)}.s5{stroke:var(--c5)}.s6{stroke:var(--c6)}
svg circle,svg polygon{stroke:var(--paper);stroke-width:.8}
.grid{stroke:var(--line);stroke-width:.8;fill:none}
.axis{stroke:var(--muted);fill:none}
.diagonal{stroke:var(--muted);stroke-dasharray:4 3;fill:none}
.whisker{stroke:var(--ink);stroke-width:1.4;fill:none}
.spread{fill:var(--muted);fill-opacity:.45}
.seed{stroke:var(--muted);stroke-width:1.2;fill:none}
.line{fill:none;stroke-width:1.5}
.thin{fill:none;stroke-width:1;stroke-opacity:.6}
.frame{fill:none;stroke:var(--line)}
.band0{fill:none}.band1{fill:var(--soft)}
.heat{fill:var(--heat)}
.vh{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
@media (min-width:30.01rem){section>.scroll wbr{display:none}}
@media (max-width:30rem){table{font-size:.82rem}th,td{padding:.4rem .5rem}th[scope=row],thead th:first-child{
min-width:8.2rem;max-width:8.2rem}}
@media print{:root{--paper:#fff;--soft:#f4f6f8;--ink:#000;--muted:#444;--line:#bbb;--accent:#0b63a5;
--c1:#0072b2;--c2:#c04a00;--c3:#00795a;--c4:#a8397f;--c5:#8a6200;--c6:#4b4f56;--heat:#0b5e9e;--on-heat:#fff}
html{color-scheme:light}body{font-size:10pt}main{max-width:none;padding:0}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.scroll{overflow:visible;border:0}table{font-size:8pt}td small{white-space:nowrap}
th,td{white-space:normal;padding:.2rem .35rem}
th[scope=row],thead th:first-child{position:static;min-width:0}th button::after{content:""!important}
figure,tr,pre{break-inside:avoid}h2,h3{break-after:avoid}
details::details-content{content-visibility:visible;block-size:auto}}
""".strip()

SCRIPT = """
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
""".strip()
