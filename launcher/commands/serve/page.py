"""The page of `shardlaunch serve`: a form for what the model takes, and what it makes of that."""

from html import escape

from shardlaunch.launcher.commands.serve.models import Kind

_FORMS: dict[str, str] = {
    "text": '<label>Text<textarea id="text" rows="5" required></textarea></label>',
    "prompt": (
        '<label>Prompt<textarea id="text" rows="4"></textarea></label><div class="row">'
        '<label>New tokens<input id="length" type="number" min="1" max="2000" value="60"></label>'
        '<label>Temperature<input id="temperature" type="number" min="0" max="5" step="0.1" value="0.8"></label>'
        '<label>Seed<input id="seed" type="number" min="0" value="0"></label></div>'
    ),
    "image": (
        '<label>Picture<input id="file" type="file" accept="image/*" required></label><img id="shown" alt="" hidden>'
    ),
}
_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59616b;--line:#d5dae0;--bar:#0067a5;--bg:#fff}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a2aab4;--line:#3a424b;--bar:#5db4ee;--bg:#14171b}}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:680px;margin:0 auto;padding:28px 16px 60px}
h1{font-size:22px;margin:0 0 16px;overflow-wrap:anywhere}
label{display:block;color:var(--soft);font-size:14px;margin:10px 0}
textarea,input{display:block;width:100%;box-sizing:border-box;font:inherit;color:var(--ink);background:transparent;
border:1px solid var(--line);border-radius:8px;padding:8px 10px;margin-top:4px}
.row{display:flex;gap:12px}
.row label{flex:1;min-width:0}
button{font:inherit;font-weight:600;padding:8px 18px;border:0;border-radius:8px;background:var(--bar);color:var(--bg)}
button:disabled{opacity:.5}
img{max-width:160px;display:block;margin:8px 0}
img[hidden]{display:none}
#out{margin-top:22px;white-space:pre-wrap;overflow-wrap:anywhere}
.score{display:grid;grid-template-columns:minmax(4em,30%) 1fr 4.5em;gap:10px;align-items:center;margin:3px 0}
.score div{height:12px;border-radius:3px;background:var(--bar)}
.score span:last-child{text-align:right;font-variant-numeric:tabular-nums}
"""
_SCRIPT = """
const form = document.querySelector('form'), out = document.querySelector('#out');
const button = form.querySelector('button');
const get = id => document.getElementById(id);
const dataOf = file => new Promise((done, failed) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result); reader.onerror = () => failed(reader.error); reader.readAsDataURL(file);
});
const request = async () => {
  if (KIND === 'text') return {texts: [get('text').value]};
  if (KIND === 'prompt') return {prompt: get('text').value, max_new_tokens: +get('length').value,
    temperature: +get('temperature').value, seed: +get('seed').value};
  const url = await dataOf(get('file').files[0]);
  get('shown').src = url; get('shown').hidden = false;
  return {image: url.slice(url.indexOf(',') + 1)};
};
const show = answer => {
  out.textContent = '';
  const text = answer.error ?? answer.text;
  if (text !== undefined) { out.textContent = text; return; }
  const found = answer.predictions[0];
  if (found.value !== undefined) { out.textContent = found.value; return; }
  for (const [label, score] of Object.entries(found.scores).sort((one, other) => other[1] - one[1]).slice(0, 20)) {
    const row = document.createElement('div'), name = document.createElement('span');
    const bar = document.createElement('div'), number = document.createElement('span');
    row.className = 'score'; name.textContent = label; number.textContent = score.toFixed(4);
    bar.style.width = `${Math.max(0.5, 100 * score)}%`;
    row.append(name, bar, number); out.append(row);
  }
};
form.addEventListener('submit', async event => {
  event.preventDefault();
  button.disabled = true;
  try {
    const body = JSON.stringify(await request());
    const response = await fetch('/predict', {method: 'POST', headers: {'Content-Type': 'application/json'}, body});
    show(await response.json());
  } catch (error) { show({error: String(error)}); }
  button.disabled = false;
});
"""


def page(kind: Kind, title: str) -> str:
    """Return the page for a kind of model."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><main><h1>{escape(title)}</h1><form>{_FORMS[kind]}"
        f'<button>Run</button></form><div id="out" role="status"></div></main>'
        f"<script>const KIND = '{kind}';{_SCRIPT}</script></body></html>"
    )
