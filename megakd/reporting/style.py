"""The page's looks: light, dark and on paper. Colours keep apart for all kinds of colour vision; from the seventh run
on they come around with another kind of line."""

STYLE = """
:root{color-scheme:light dark;--ink:#1d2129;--soft:#5d6470;--faint:#8a919c;--rule:#e3e6ea;--back:#fff;--raised:#f6f7f9;
--accent:#0b5cad;--warn:#8a4b00;--warn-back:#fff6e6;
--c0:#0068ad;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#6b4a00;--c5:#30363f}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e7e9ec;--soft:#a8afba;--faint:#7d8591;--rule:#2d333c;
--back:#14171b;--raised:#1c2026;--accent:#6cb6ff;--warn:#ffc46b;--warn-back:#2b2213;
--c0:#62b6f5;--c1:#e0602a;--c2:#1f9f80;--c3:#cf6fae;--c4:#f0dc5a;--c5:#e8ebef}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","Liberation Sans",sans-serif;font-variant-numeric:tabular-nums}
body>input{position:absolute;opacity:0;pointer-events:none}
header{position:sticky;top:0;z-index:2;display:flex;flex-wrap:wrap;align-items:center;gap:.4rem 1.6rem;
padding:.65rem 1.5rem;background:var(--back);border-bottom:1px solid var(--rule)}
h1{font-size:1.1rem;font-weight:650;margin:0}
h2{font-size:1.15rem;font-weight:650;margin:0 0 .5rem}
main,footer{max-width:84rem;margin:0 auto;padding:0 1.5rem}
section{margin:2rem 0 2.4rem}
footer{padding-top:1rem;padding-bottom:2.5rem;color:var(--soft);font-size:.85rem;border-top:1px solid var(--rule)}
small{color:var(--soft);font-size:.82em}
.remark,.missing{color:var(--soft);margin:.1rem 0 .9rem;max-width:60rem}
.legend,.axes{display:flex;flex-wrap:wrap;align-items:center;gap:.2rem 1rem}
header label{cursor:pointer;border-radius:3px}
.axes{margin-left:auto;gap:0;font-size:.88rem}.axes span{color:var(--soft);margin-right:.6rem}
.axes label{padding:.15rem .7rem;border:1px solid var(--rule);margin-left:-1px;border-radius:0}
.axes label:first-of-type{border-radius:5px 0 0 5px}.axes label:last-of-type{border-radius:0 5px 5px 0}
#by-step:checked~header label[for=by-step],#by-tokens:checked~header label[for=by-tokens],
#by-seconds:checked~header label[for=by-seconds]{background:var(--ink);color:var(--back);border-color:var(--ink)}
.by-step,.by-tokens,.by-seconds{display:none}
#by-step:checked~main .by-step,#by-tokens:checked~main .by-tokens,#by-seconds:checked~main .by-seconds{display:block}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.d0{--d:none;--s:solid}.d1{--d:7 4;--s:dashed}.d2{--d:2 3;--s:dotted}.d3{--d:10 3 2 3;--s:double}
.name>i,.end>i,.legend i,#tip i{display:inline-block;width:1.1em;height:0;border-top:3px var(--s) var(--c);
vertical-align:.24em;margin-right:.4em}
.charts{margin:1rem 0 -1.4rem;display:grid;
grid-template-columns:repeat(auto-fill,minmax(min(100%,30rem),1fr));column-gap:2.2rem}
.chart{display:grid;grid-template-rows:subgrid;grid-row:span 2;margin:0;min-width:0;break-inside:avoid}
figcaption{display:flex;flex-wrap:wrap;align-items:baseline;gap:0 .6rem;min-height:1.6rem}
figcaption b{font-weight:600}figcaption span{color:var(--soft)}
.plot{position:relative;height:13rem;margin:.5rem calc(var(--letters)*.47rem + 2.2rem) 3.2rem 3.4rem}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible;clip-path:inset(-3px -5px)}
.plot path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke-linecap:round}
.plot .grid{stroke:var(--rule);stroke-width:1}
.plot .line{stroke:var(--c);stroke-width:1.8;stroke-dasharray:var(--d)}
.plot .band{fill:var(--c);opacity:.18}
.plot .dots{stroke:var(--c);stroke-width:5.5}
.plot .broken{stroke:var(--c);stroke-width:2}
.plot .reference .line{stroke-width:1.3;stroke-dasharray:1.5 4}
.plot span{position:absolute;font-size:.78rem;line-height:1;color:var(--soft);white-space:nowrap}
.plot .y{right:calc(100% + .5rem);transform:translateY(-50%)}
.plot .x{top:calc(100% + .5rem);transform:translateX(-50%)}
.plot .unit{top:calc(100% + .5rem);left:calc(100% + 1.4rem)}
.plot .end{left:calc(100% + .45rem);transform:translateY(-50%);
color:var(--ink);line-height:1.2}
.plot .absent,.absent{color:var(--faint)}
.plot>.absent{position:absolute;inset:0;margin:0;display:grid;place-items:center;border:1px dashed var(--rule)}
.here{position:absolute;pointer-events:none}
.cross{top:0;bottom:0;border-left:1px solid var(--faint)}
.dot{width:9px;height:9px;margin:-4.5px;border-radius:50%;background:var(--c);border:1.5px solid var(--back)}
#tip{position:fixed;z-index:3;padding:.4rem .6rem;background:var(--raised);border:1px solid var(--rule);
border-radius:5px;box-shadow:0 2px 10px #0003;font-size:.83rem;pointer-events:none}
.scroll{overflow-x:auto;margin:.4rem 0}
table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.32rem 1.4rem .32rem 0;text-align:left;vertical-align:baseline;border-bottom:1px solid var(--rule)}
th[scope=row]{font-weight:400;color:var(--soft);white-space:nowrap}
thead th{font-weight:600;white-space:nowrap}
td small{display:block;white-space:nowrap}
td{overflow-wrap:anywhere}
td code{overflow-wrap:anywhere}
code{font:.92em/1.4 ui-monospace,"DejaVu Sans Mono","Liberation Mono",monospace}
.values b{font-weight:700}.values b::after{content:" \\2190 best";font-weight:400;color:var(--soft);font-size:.82em}
.notes{margin:1rem 0 0;padding:.6rem 1rem .6rem 1.8rem;background:var(--warn-back);color:var(--warn);border-radius:5px}
.notes .name{color:var(--ink);font-weight:600}
.bars{margin:.4rem 0 1.2rem}.bars>div{margin-bottom:.7rem}
.bar{display:flex;height:1.7rem;margin-top:.15rem}
.bar span{min-width:1px;background:color-mix(in srgb,var(--c) var(--mix),var(--back));
border-right:2px solid var(--back);overflow:hidden}
.bar em{font-style:normal;font-size:.8rem;line-height:1.7rem;padding:0 .5rem;white-space:nowrap;display:block;
overflow:hidden;text-overflow:ellipsis}
summary{cursor:pointer;color:var(--accent);margin:.6rem 0}
@media (max-width:40rem){header,main,footer{padding-left:.9rem;padding-right:.9rem}.axes{margin-left:0}
.plot{margin-right:3.6rem;margin-left:3rem}.plot .end{display:none}.plot .unit{left:calc(100% + .8rem)}}
@media print{html{font-size:10px}body{font-size:8.5pt}header{position:static}.charts{grid-template-columns:1fr 1fr}
main,footer,header{padding-left:0;padding-right:0}section{margin:1.4rem 0}.bar span,.notes{print-color-adjust:exact}
.axes,summary,section:has(>h2+details:not([open])){display:none}.scroll{overflow:visible}th,td{padding-right:.8rem}
thead th,th[scope=row],td small{white-space:normal}h2,.remark{break-after:avoid}tr{break-inside:avoid}}
"""
