"use strict";
// Texts are only ever set as textContent: what a sample says stays text.
const byId = (id) => document.getElementById(id);

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function followScheme() {
  const button = byId("scheme"), root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.scheme || (dark.matches ? "dark" : "light")) === "dark";
  const show = () => {
    button.textContent = isDark() ? "light" : "dark";
    button.setAttribute("aria-pressed", String(isDark()));
  };
  button.addEventListener("click", () => {
    root.dataset.scheme = isDark() ? "light" : "dark";
    show();
  });
  dark.addEventListener("change", show);
  show();
}

// Numbers by their value, "<= 1.8", "<0.001", "1,200" and an interval "[9.5, 12.0]" (by its lower
// end) too; what is no number goes to the end.
function sortKey(text) {
  const number = parseFloat(text.replace(/^(?:<=?|\[)\s*/, "").replace(/,(?=\d{3})/g, ""));
  return Number.isNaN(number) ? null : number;
}

function compareCells(a, b, sign) {
  const x = sortKey(a), y = sortKey(b);
  if (x !== null && y !== null) return sign * (x - y);
  if (x !== null || y !== null) return x === null ? 1 : -1;
  return sign * a.localeCompare(b);
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      const text = (row) => row.cells[column].textContent.trim();
      body.append(...[...body.rows].sort((a, b) => compareCells(text(a), text(b), up ? 1 : -1)));
    });
  });
}

function browseSamples() {
  const source = byId("sample-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const table = byId("sample-table"), order = byId("order"), PAGE = 20, DEMONSTRATIONS = 2;
  let limit = PAGE;

  const boxes = ["demonstrations", ...data.methods].map((name) => {
    const label = element("label"), box = element("input");
    Object.assign(box, { type: "checkbox", checked: true });
    label.append(box, ` ${name}`);
    byId("columns").append(label);
    return box;
  });
  const chosen = (cells) => cells.filter((_, at) => boxes[at].checked);
  const heading = (name, scope) => Object.assign(element("th", name), { scope });
  const choose = (value, text) => {
    const option = element("option", text);
    option.value = value;
    order.append(option);
  };
  choose("", "the data's order");
  choose("prompt", "prompt");
  data.methods.forEach((method, m) => choose(`words/${m}`, `words, ${method}`));
  data.scores.forEach((score, s) =>
    data.methods.forEach((method, m) => choose(`${m}/${s}`, `${score.replaceAll("_", " ")}, ${method}`)));

  const countWords = (text) => text.split(/\s+/).filter(Boolean).length;
  const said = (row) => row.s[Number(byId("temperature").value)];
  const matches = (row, words) => {
    const text = [row.p, ...row.d, ...said(row).map((cell) => (cell ? cell[0] : ""))].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  };

  function sorted(rows) {
    const sign = byId("reverse").checked ? -1 : 1;
    if (order.value === "") return sign < 0 ? rows.reverse() : rows;
    if (order.value === "prompt") return rows.sort((a, b) => sign * a.p.localeCompare(b.p));
    const [first, second] = order.value.split("/");
    const number = (cell) => (first === "words" ? countWords(cell[0]) : cell[Number(second) + 1]);
    const method = Number(first === "words" ? second : first);
    const value = (row) => (said(row)[method] ? number(said(row)[method]) : null);
    return rows.sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (x - y);
    });
  }

  function demonstrationCell(texts) {
    const made = element("td"), paragraph = (text) => element("p", text);
    made.append(...texts.slice(0, DEMONSTRATIONS).map(paragraph));
    const rest = texts.slice(DEMONSTRATIONS);
    if (rest.length) {
      const more = Object.assign(element("button", `${rest.length} more`), { type: "button" });
      more.addEventListener("click", () => more.replaceWith(...rest.map(paragraph)));
      made.append(more);
    }
    return made;
  }

  function sampleCell(cell) {
    const made = element("td", cell ? cell[0] : "–");
    if (!cell) return made;
    const scores = data.scores.map((name, s) => [name, cell[s + 1]]).filter(([, v]) => v !== null);
    const shown = scores.map(([name, v]) => `${name.replaceAll("_", " ")} ${Number(v.toPrecision(4))}`);
    made.append(element("span", shown.join(" · "), "score"));
    return made;
  }

  function show() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = sorted(data.rows.filter((row) => matches(row, words)));
    const head = element("tr");
    const names = ["demonstrations", ...data.methods].map((name) => heading(name, "col"));
    head.append(heading("prompt", "col"), ...chosen(names));
    table.tHead.replaceChildren(head);
    table.tBodies[0].replaceChildren(...found.slice(0, limit).map((row) => {
      const line = element("tr");
      const cells = [demonstrationCell(row.d), ...said(row).map(sampleCell)];
      line.append(heading(row.p, "row"), ...chosen(cells));
      return line;
    }));
    byId("found").textContent = `${found.length} found, ${Math.min(limit, found.length)} shown`;
    byId("more").hidden = found.length <= limit;
  }

  const restart = () => { limit = PAGE; show(); };
  byId("browse").addEventListener("input", restart);
  byId("browse").addEventListener("submit", (event) => event.preventDefault());
  byId("more").addEventListener("click", () => { limit += PAGE; show(); });
  show();
}

function drawCredit() {
  const choice = byId("shown");
  if (!choice) return;
  const tokens = [...document.querySelectorAll(".token")];
  const tint = () => tokens.forEach((token) => {
    const share = Number(token.dataset[choice.value] || 0);
    token.classList.toggle("up", share > 0);
    token.classList.toggle("down", share < 0);
    token.style.setProperty("--share", `${Math.round(70 * Math.abs(share))}%`);
  });
  const tell = (event) => {
    const token = event.target.closest(".token");
    if (token) byId("values").textContent = `“${token.textContent}” ${token.title}`;
  };
  const area = byId("credit");
  area.addEventListener("pointerover", tell);
  area.addEventListener("focusin", tell);
  area.addEventListener("keydown", (event) => {
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    const next = step && event.target.classList.contains("token") && event.target[step];
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    event.preventDefault();
  });
  choice.addEventListener("change", tint);
  tint();
}

followScheme();
document.querySelectorAll("table.sortable").forEach(makeSortable);
browseSamples();
drawCredit();
