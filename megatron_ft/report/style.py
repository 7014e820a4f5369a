"""The page's style sheet, light and dark, without external fonts or images."""

STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --card: #fff; --ink: #1d2126; --soft: #667079; --line: #e3e5e8;
  --a: #2563c9; --b: #d9730d; --good: #17803d; --bad: #c8281e; --you: #dbe8fb; --bot: #d9f2e0; --sys: #ecedef;
  --ctx: #fdeacc; --c: #17803d; --d: #8e44ad; }
@media (prefers-color-scheme: dark) { :root { --bg: #15181c; --card: #1d2126; --ink: #e6e8ea; --soft: #9aa4ae;
  --line: #343a41; --a: #6ea5ff; --b: #f2a154; --good: #56c77d; --bad: #ff7a70; --you: #223a5e; --bot: #1f4a2e;
  --sys: #363b41; --ctx: #574018; --c: #56c77d; --d: #c58fe0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 25px; margin: 0; line-height: 1.25; }
h2 { font-size: 17px; margin: 0 0 8px; }
h3 { font-size: 14px; margin: 16px 0 6px; }
.sub { color: var(--soft); margin: 4px 0 20px; }
.note { color: var(--soft); margin: -4px 0 12px; max-width: 90ch; }
.below { color: var(--soft); margin: 12px 0 0; max-width: 90ch; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin: 0 0 16px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, th.code { text-align: left; color: var(--soft); font: 600 12.5px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.code, code, pre { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 12.5px; }
.code { overflow-wrap: anywhere; }
.soft { color: var(--soft); }
pre { background: var(--bg); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  overflow-x: auto; margin: 8px 0; line-height: 1.55; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.soft { color: var(--soft); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 18px 26px; }
figure { margin: 0; }
figcaption { font-size: 13.5px; display: flex; gap: 4px 16px; flex-wrap: wrap; }
svg { width: 100%; height: auto; display: block; margin-top: 4px; }
svg text { font-size: 11.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); }
.axis { stroke: var(--soft); }
.grid, .axis, .mark { fill: none; stroke-width: 1; }
path.mark { stroke: var(--soft); stroke-dasharray: 3 3; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.line.a { stroke: var(--a); }
.line.b { stroke: var(--b); stroke-dasharray: 7 3; }
.line.c { stroke: var(--c); stroke-dasharray: 2 3; }
.line.d { stroke: var(--d); stroke-dasharray: 9 3 2 3; }
.dot.a { fill: var(--a); }
.dot.b { fill: var(--b); }
.line.n1 { stroke: var(--a); }
.line.n2 { stroke: var(--b); stroke-dasharray: 7 3; }
.line.n3 { stroke: var(--c); stroke-dasharray: 2 3; }
.line.n4 { stroke: var(--d); stroke-dasharray: 8 3 2 3; }
.line.n5 { stroke: var(--ink); stroke-width: 1.1; }
.line.n6 { stroke: var(--bad); stroke-dasharray: 12 4; }
.runs { display: flex; gap: 4px 18px; flex-wrap: wrap; font-size: 13.5px; margin: 0 0 10px; color: var(--soft); }
.runs svg { display: inline-block; width: 34px; height: 9px; margin: 0 7px 0 0; vertical-align: middle; }
.hover { fill: transparent; }
.hover:hover { fill: var(--a); fill-opacity: .35; }
.line.dashed { stroke-dasharray: 6 4; }
.column { fill: var(--a); fill-opacity: .3; stroke: var(--a); }
.ground { fill: none; }
.key { color: var(--soft); }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 6px;
  vertical-align: middle; background: currentColor; }
.key.a::before { background: var(--a); }
.key.b::before { width: 22px; background: repeating-linear-gradient(90deg, var(--b) 0 6px, transparent 6px 9px); }
.key.c::before { width: 22px; background: repeating-linear-gradient(90deg, var(--c) 0 2px, transparent 2px 5px); }
.key.d::before { width: 22px;
  background: linear-gradient(90deg, var(--d) 0 9px, transparent 9px 13px, var(--d) 13px 16px, transparent 16px); }
.key.bars::before { width: 12px; height: 9px; background: color-mix(in srgb, var(--a) 30%, transparent);
  border: 1px solid var(--a); }
.key.dashed::before { width: 22px; background: repeating-linear-gradient(90deg, var(--b) 0 6px, transparent 6px 9px); }
.key.mark::before { width: 1px; height: 12px; }
.bar { display: flex; align-items: center; gap: 10px; margin: 4px 0; font-size: 13.5px; }
.bar em { flex: 1 1 40px; }
.bar i { display: block; height: 12px; min-width: 2px; border-radius: 3px; background: var(--a); }
.bar span:first-child { flex: 0 1 150px; overflow-wrap: anywhere; }
.bar span:last-child { flex: 0 0 150px; color: var(--soft); font-variant-numeric: tabular-nums; }
.chat { border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; margin: 8px 0; line-height: 1.9;
  white-space: pre-wrap; }
.role { border-radius: 4px; padding: 2px 4px; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.role.system { background: var(--sys); }
.role.prompter { background: var(--you); }
.role.assistant { background: var(--bot); }
.role.context { background: var(--ctx); }
.on { border-bottom: 2px solid var(--good); }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); gap: 10px 40px; }
details summary { cursor: pointer; color: var(--soft); margin-top: 10px; }
"""
