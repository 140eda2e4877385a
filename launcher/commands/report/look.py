"""How a report looks, and what moves in it: one style sheet and a few lines of JavaScript, both in the page."""

# Colours that remain apart for the colour-blind (Okabe and Ito), darker on light ground and lighter on dark.
_LIGHT = ("#0067a5", "#c4500a", "#00805f", "#a8477f", "#8a6400", "#2a7fb8", "#5b5f66", "#7b4bb3")
_DARK = ("#5db4ee", "#ff9a55", "#3ccfa4", "#eda3cf", "#f0c24b", "#9bd4f7", "#b4b9c2", "#c3a3ee")
NUM_COLORS = len(_LIGHT)


def _palette(colors: tuple[str, ...]) -> str:
    return "".join(f"--c{number}:{color};" for number, color in enumerate(colors))


_LIGHT_VARIABLES = (
    "color-scheme:light;--bg:#fff;--ink:#1b1f24;--soft:#59616b;--line:#dfe3e8;--grid:#eceff2;--heat:0,103,165;"
    + _palette(_LIGHT)
)
_DARK_VARIABLES = (
    "color-scheme:dark;--bg:#14171b;--ink:#e8eaed;--soft:#a2aab4;--line:#333a42;--grid:#262c33;"
    "--heat:93,180,238;" + _palette(_DARK)
)
_COLORS = "".join(
    f".c{n}{{--c:var(--c{n})}}.t{n}{{fill:var(--c{n})}}.k{n}{{background:var(--c{n})}}" for n in range(NUM_COLORS)
)

PART_COLORS = (4, 0, 2, 6)
"""Of the parts of a step."""
_PARTS = "".join(f".p{number}{{background:var(--c{color})}}" for number, color in enumerate(PART_COLORS))

STYLE = f"""
:root{{{_LIGHT_VARIABLES}}}
@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{_DARK_VARIABLES}}}}}
:root[data-theme=dark]{{{_DARK_VARIABLES}}}
{_COLORS}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}}
main{{max-width:1360px;margin:0 auto;padding:28px clamp(14px,3vw,40px) 60px}}
h1{{font-size:26px;line-height:1.2;margin:0 0 2px;letter-spacing:-.01em}}
h2{{font-size:18px;margin:44px 0 4px;padding-top:14px;border-top:1px solid var(--line)}}
h3{{font-size:14px;margin:18px 0 6px;overflow-wrap:anywhere}}
p{{margin:4px 0 12px;max-width:75ch;overflow-wrap:anywhere}}
.soft,figcaption,caption{{color:var(--soft);font-size:13px}}
.wide{{overflow-x:auto;margin:8px 0}}
table{{border-collapse:collapse;font-size:14px}}
caption{{text-align:left;padding:0 0 4px}}
th,td{{text-align:left;padding:5px 18px 5px 0;border-bottom:1px solid var(--grid);vertical-align:top;max-width:46ch;
overflow-wrap:break-word}}
th{{font-weight:600;color:var(--soft);white-space:nowrap}}
td.n,th.n{{text-align:right}}
td.n{{white-space:nowrap}}
.key{{display:inline-block;min-width:1.5em;padding:0 .35em;border-radius:4px;color:var(--bg);font-weight:650;
font-size:12px;line-height:1.6;text-align:center;margin-right:.5em}}
td:first-child{{min-width:12ch}}
td.long{{min-width:min(24ch,60vw);overflow-wrap:anywhere}}
@media (max-width:600px){{td .name{{display:none}}td:has(>.key:first-child){{min-width:0}}}}
.keys{{position:sticky;top:0;z-index:3;background:var(--bg);padding:8px 0;margin:10px 0 0;display:flex;flex-wrap:wrap;
gap:4px 18px;font-size:13px;border-bottom:1px solid var(--line)}}
.keys span{{overflow-wrap:anywhere}}
.grid-of{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr));gap:22px 30px;
margin-top:12px}}
figure{{margin:0;min-width:0;display:flex;flex-direction:column;justify-content:space-between}}
figcaption b{{color:var(--ink);font-size:14px;margin-right:.4em}}
.plot{{position:relative}}
svg{{display:block;width:100%;height:auto;overflow:visible}}
svg text{{font:11.5px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}}
.tick,.unit{{fill:var(--soft)}}
.end{{font-weight:600}}
.grid{{stroke:var(--grid)}}
.axis{{stroke:var(--line)}}
.l{{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}}
.faint{{opacity:.28;stroke-width:1}}
.dash{{stroke-dasharray:5 3}}
.band{{fill:var(--c);opacity:.18}}
.dot{{fill:var(--c)}}
.hollow{{fill:var(--bg);stroke:var(--c);stroke-width:1.3}}
.cursor{{stroke:var(--soft);stroke-dasharray:2 3;visibility:hidden}}
.tip{{position:absolute;top:4px;pointer-events:none;visibility:hidden;background:var(--bg);border:1px solid var(--line);
border-radius:6px;padding:4px 8px;font-size:12px;line-height:1.45;white-space:nowrap}}
.tip i{{display:inline-block;width:8px;height:8px;border-radius:2px;background:var(--c);margin-right:5px}}
.bar{{display:flex;height:14px;width:100%;min-width:160px;border-radius:3px;overflow:hidden;background:var(--grid)}}
{_PARTS}
.parts span{{white-space:nowrap}}
.parts i{{display:inline-block;width:10px;height:10px;border-radius:2px;margin:0 5px 0 12px}}
.matrix td,.matrix th{{padding:4px 9px;text-align:right;border:0;max-width:16ch}}
.matrix caption{{white-space:nowrap}}
.matrix td.hit{{outline:1px solid var(--soft);outline-offset:-1px}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--grid);border-radius:6px;padding:10px 12px;margin:0;
font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,monospace;max-height:22em;overflow-y:auto}}
img{{max-width:100%;height:auto;display:block;image-rendering:pixelated;min-width:min(100%,112px)}}
details{{margin:10px 0}}
summary{{cursor:pointer;color:var(--soft)}}
ul{{padding-left:1.2em;margin:6px 0}}
li{{overflow-wrap:anywhere}}
"""

# A pointer over a chart, or a finger, shows the nearest step of each line.
SCRIPT = """
for (const figure of document.querySelectorAll('.chart')) {
  const data = JSON.parse(figure.querySelector('script').textContent);
  const svg = figure.querySelector('svg'), tip = figure.querySelector('.tip'), cursor = figure.querySelector('.cursor');
  const plot = figure.querySelector('.plot'), grid = figure.querySelector('.axis');
  const left = +grid.getAttribute('x1'), right = +grid.getAttribute('x2');
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] > x) high = middle; else low = middle; }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };
  const show = event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const at = Math.min(right, Math.max(left, (event.clientX - box.left) * scale));
    const step = data.from + (at - left) / (right - left) * (data.to - data.from);
    tip.textContent = '';
    for (const line of data.lines) {
      const i = nearest(line.x, step), row = document.createElement('div'), mark = document.createElement('i');
      mark.style.background = `var(--c${line.c})`;
      row.append(mark, `${line.run}  step ${line.x[i]}: ${line.y[i]}`);
      tip.append(row);
    }
    cursor.setAttribute('x1', at); cursor.setAttribute('x2', at);
    cursor.style.visibility = tip.style.visibility = 'visible';
    const x = at / scale;
    const fits = x + 10 + tip.offsetWidth < plot.clientWidth;
    tip.style.left = Math.max(0, fits ? x + 10 : x - 10 - tip.offsetWidth) + 'px';
  };
  plot.addEventListener('pointermove', show);
  plot.addEventListener('pointerdown', show);
  plot.addEventListener('pointerleave', () => { cursor.style.visibility = tip.style.visibility = 'hidden'; });
}
"""
