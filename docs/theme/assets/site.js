// Menu, color theme, copy buttons, search. No library, no request to anybody else; works from a folder too.
const one = (selector) => document.querySelector(selector);
const root = document.documentElement;

one(".menu").addEventListener("click", (event) => {
  const open = document.body.classList.toggle("menu-open");
  event.currentTarget.setAttribute("aria-expanded", open);
});

one(".theme").addEventListener("click", () => {
  const themes = ["auto", "light", "dark"];
  root.dataset.theme = themes[(themes.indexOf(root.dataset.theme) + 1) % themes.length];
  localStorage.setItem("theme", root.dataset.theme);
});

for (const block of document.querySelectorAll("pre")) {
  const button = Object.assign(document.createElement("button"), { className: "copy", textContent: "copy" });
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.querySelector("code").innerText);
    button.textContent = "copied";
    setTimeout(() => (button.textContent = "copy"), 1500);
  });
  block.append(button);
}

// The index is a script, which a page opened from a folder may load (it may not fetch JSON).
const input = one("header input");
const found = one(".found");
let index;
input.addEventListener("focus", () => {
  if (index !== undefined) return;
  index = [];
  const script = document.createElement("script");
  script.src = `${BASE}/assets/search.js`;
  script.addEventListener("load", () => { index = SEARCH; search(); });
  document.head.append(script);
});

const escape = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

function score(entry, words) {
  const title = entry.title.toLowerCase();
  const text = entry.text.toLowerCase();
  let total = 0;
  for (const word of words) {
    if (!title.includes(word) && !text.includes(word)) return 0;
    total += title.includes(word) ? 10 + (title.startsWith(word) ? 10 : 0) : 1;
  }
  return total - entry.location.includes("#") / 2;
}

function excerpt(page, word) {
  const text = page.replaceAll("¶ ", ""); // the links of headings
  const at = Math.max(0, text.toLowerCase().indexOf(word) - 40);
  const part = escape((at ? "…" : "") + text.slice(at, at + 130));
  const start = part.toLowerCase().indexOf(escape(word));
  if (start < 0) return part;
  const end = start + escape(word).length;
  return `${part.slice(0, start)}<mark>${part.slice(start, end)}</mark>${part.slice(end)}`;
}

function search() {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  const hits = (words.length ? index || [] : [])
    .map((entry) => [score(entry, words), entry])
    .filter(([value]) => value > 0)
    .sort((a, b) => b[0] - a[0])
    .slice(0, 12);
  found.hidden = !words.length;
  found.innerHTML = hits.length
    ? hits.map(([, e]) => `<li><a href="${BASE}/${e.location}">${escape(e.title)}<small>${excerpt(e.text, words[0])}</small></a></li>`).join("")
    : "<li><small>Nothing found</small></li>";
}
input.addEventListener("input", search);
one("header form").addEventListener("submit", (event) => {
  event.preventDefault();
  found.querySelector("a")?.click();
});
document.addEventListener("click", (event) => { if (!event.target.closest("header")) found.hidden = true; });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") found.hidden = true;
  if (event.key === "/" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) { event.preventDefault(); input.focus(); }
});
