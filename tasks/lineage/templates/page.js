"use strict";
(function () {
  const nodes = JSON.parse(document.getElementById("data").textContent);
  const svg = document.querySelector(".canvas svg");
  const detail = document.getElementById("detail");
  const empty = detail.innerHTML;
  const shapes = new Map(), out = new Map(), into = new Map();
  svg.querySelectorAll(".node").forEach((shape) => shapes.set(Number(shape.dataset.n), shape));
  const paths = [...svg.querySelectorAll(".path")].map((path) =>
    ({ path, from: Number(path.dataset.from), to: Number(path.dataset.to) }));
  for (const one of paths) {
    if (!out.has(one.from)) out.set(one.from, []);
    if (!into.has(one.to)) into.set(one.to, []);
    out.get(one.from).push(one.to);
    into.get(one.to).push(one.from);
  }
  let chosen = null;
  // MLflow shows files in a frame that may run scripts, but neither open a window nor leave its page
  const framed = window.top !== window && window.origin === "null";

  function reached(start, ways) {
    const found = new Set([start]), left = [start];
    while (left.length) {
      for (const next of ways.get(left.pop()) || []) {
        if (!found.has(next)) { found.add(next); left.push(next); }
      }
    }
    return found;
  }

  // text is only ever set as text: names are anybody's
  function element(kind, text, parent) {
    const made = document.createElement(kind);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.appendChild(made);
    return made;
  }

  function spell(link) {
    if (!framed) return;
    const address = document.createElement("code");
    address.className = "address";
    address.textContent = link.getAttribute("href");
    link.after(" ", address);
  }

  function tell(node) {
    detail.textContent = "";
    element("span", node.kind, detail).className = "kind";
    const title = element("h3", node.title, detail);
    for (const badge of node.badges) {
      const chip = element("span", badge, title);
      chip.className = badge === "left out" || badge === "refused" ? "alias-chip failed" : "alias-chip";
    }
    const list = element("dl", undefined, detail);
    for (const [name, value] of node.figures) {
      const pair = element("div", undefined, list);
      element("dt", name, pair);
      element("dd", value, pair);
    }
    for (const note of node.notes) element("p", note, detail);
    if (node.address) element("code", node.address, element("p", undefined, detail));
    const ways = element("p", undefined, detail);
    for (const [word, address] of node.links) {
      const link = element("a", word, ways);
      link.href = address; link.target = "_blank"; link.rel = "noopener";
      spell(link);
      ways.append(" ");
    }
    element("a", "in the table", ways).href = "#row" + node.number;
  }

  function choose(number) {
    if (!shapes.has(number)) return;
    const back = reached(number, into), on = reached(number, out);
    chosen = number;
    svg.classList.add("choosing");
    for (const [key, shape] of shapes) {
      shape.classList.toggle("lit", back.has(key) || on.has(key));
      shape.classList.toggle("chosen", key === number);
      shape.setAttribute("aria-pressed", String(key === number));
    }
    for (const { path, from, to } of paths) {
      path.classList.toggle("lit", (back.has(from) && back.has(to)) || (on.has(from) && on.has(to)));
    }
    document.querySelectorAll(".nodes tr.chosen").forEach((row) => row.classList.remove("chosen"));
    document.getElementById("row" + number).classList.add("chosen");
    tell(nodes[number]);
  }

  function release() {
    chosen = null;
    svg.classList.remove("choosing");
    for (const shape of shapes.values()) { shape.classList.remove("lit", "chosen"); shape.setAttribute("aria-pressed", "false"); }
    document.querySelectorAll(".nodes tr.chosen").forEach((row) => row.classList.remove("chosen"));
    detail.innerHTML = empty;
  }

  function nearest(number, dx, dy) {
    const here = shapes.get(number).getBBox();
    let best = null, least = Infinity;
    for (const [key, shape] of shapes) {
      const box = shape.getBBox();
      const along = dx ? (box.x - here.x) * dx : (box.y - here.y) * dy;
      const beside = dx ? Math.abs(box.y - here.y) : Math.abs(box.x - here.x);
      if (key !== number && along > 20 && along + 4 * beside < least) { best = key; least = along + 4 * beside; }
    }
    return best;
  }

  const arrows = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  for (const [number, shape] of shapes) {
    shape.addEventListener("click", () => (chosen === number ? release() : choose(number)));
    shape.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(number); return; }
      const way = arrows[event.key];
      if (!way) return;
      event.preventDefault();
      const next = nearest(number, way[0], way[1]);
      if (next !== null) { shapes.get(next).focus(); choose(next); }
    });
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") release(); });

  function follow() {
    const match = /^#n(\d+)$/.exec(location.hash);
    if (match) choose(Number(match[1]));
  }
  document.getElementById("framed").hidden = !framed;
  document.querySelectorAll("a[target]").forEach(spell);
  window.addEventListener("hashchange", follow);
  follow();
})();
