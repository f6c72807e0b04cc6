"use strict";

const content = (id) => document.getElementById(id)?.textContent;

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

async function unpacked(id) {
  const stream = new Blob([bytes(content(id))]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

// Tables: a click on a heading sorts by it, a second click reverses the order; cells without a value stay last.
function key(row, column) {
  const cell = row.cells[column];
  if (cell.tagName === "TH") return cell.textContent;
  return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
}

function compare(a, b) {
  return typeof a === "string" ? a.localeCompare(b) : a - b;
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    // Numbers are sorted from the largest first, names from A to Z.
    const next = { ascending: "descending", descending: "ascending" };
    const order = next[head.getAttribute("aria-sort")] || (column ? "descending" : "ascending");
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
    rows.sort(([a], [b]) => (a === null) - (b === null) || (a === null ? 0 : sign * compare(a, b)));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }));
}

// Models: their viewer is unpacked when the first row is opened, or the first model asked for.
let viewer;

function loadViewer() {
  viewer ??= unpacked("viewer").then((script) => new Promise((resolve, reject) => {
    const tag = document.createElement("script");
    tag.src = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
    tag.onload = resolve;
    tag.onerror = reject;
    document.head.append(tag);
  }));
  return viewer;
}

const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

async function showModel(button) {
  button.disabled = true;
  button.textContent = "loading";
  const [model] = await Promise.all([unpacked(`mesh-${button.dataset.mesh}`), loadViewer()]);
  const stage = button.closest(".card").querySelector(".stage");
  const shown = document.createElement("model-viewer");
  shown.setAttribute("alt", stage.querySelector("img")?.alt || "");
  shown.setAttribute("camera-controls", "");
  shown.setAttribute("touch-action", "pan-y");
  shown.setAttribute("interaction-prompt", "none");
  shown.setAttribute("camera-orbit", "0deg 75deg 105%");
  shown.setAttribute("tone-mapping", "neutral");
  if (!still) shown.setAttribute("auto-rotate", "");
  shown.addEventListener("load", () => { button.hidden = true; });
  shown.addEventListener("error", () => { button.textContent = "this browser cannot show it"; });
  shown.src = URL.createObjectURL(new Blob([model], { type: "model/gltf-binary" }));
  stage.replaceChildren(shown);
}

// A picture turns once it can be seen: in a row that is opened, or on a page without rows when it is scrolled to.
function turn(image) {
  const turning = still ? "" : content(`turn-${image.dataset.turn}`);
  delete image.dataset.turn;
  if (turning) image.src = `data:image/webp;base64,${turning}`;
}

for (const row of document.querySelectorAll("details.prompt")) {
  row.addEventListener("toggle", () => {
    if (!row.open) return;
    if (row.querySelector("button.turn")) loadViewer();
    row.querySelectorAll("img[data-turn]").forEach(turn);
  });
}

const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    turn(target);
  }
}, { rootMargin: "200px" });
document.querySelectorAll("#models img[data-turn]").forEach((image) => seen.observe(image));

for (const button of document.querySelectorAll("button.turn")) {
  button.addEventListener("click", () => showModel(button));
}

document.getElementById("find")?.addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\s+/);
  for (const row of document.querySelectorAll(".entry")) {
    const text = row.querySelector(".words").textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
});
