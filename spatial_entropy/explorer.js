// The explorer's front end: one module for the widget (anywidget) and for the local app. It draws what Python has
// measured and measures nothing itself. `model` is anywidget's, or the app's stand-in with the same four methods.

const VIRIDIS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129],
                 [92, 200, 99], [170, 220, 50], [253, 231, 37]];

function color(v) { // 0–1 on the colour scale of the library's maps
  const at = Math.min(Math.max(v, 0), 1) * (VIRIDIS.length - 1), i = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[i].map((c, k) => Math.round(c + (at - i) * (VIRIDIS[i + 1][k] - c)));
}

function make(tag, attributes = {}, ...inside) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) {
    if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else if (v === true) e.setAttribute(k, "");
    else if (v !== false && v !== null && v !== undefined) e.setAttribute(k, v);
  }
  e.append(...inside);
  return e;
}

const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const number = (v, digits = 3) => v === null || v === undefined ? "–" : v.toFixed(digits);
const percent = v => v === null || v === undefined ? "–" : `${Math.round(100 * v)} %`;

function paint(canvas, h, w, rgba) { // one pixel a cell; CSS makes them large
  canvas.width = w; canvas.height = h;
  const image = new ImageData(w, h);
  for (let i = 0; i < h * w; i++) image.data.set(rgba(i), 4 * i);
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function paintMap(canvas, [h, w], data) { paint(canvas, h, w, i => [...color(data[i] / 255), 255]); }

function paintRegions(canvas, labels, colors) {
  const flat = labels.flat();
  paint(canvas, labels.length, labels[0].length,
        i => flat[i] ? [...colors[(flat[i] - 1) % colors.length], 255] : [255, 255, 255, 255]);
}

const OUTLINE = 112; // cells a side of the packed bits of an object

function outline(bits, n = OUTLINE) { // the border of an object, as the path of an SVG on n×n
  const on = (y, x) => y >= 0 && x >= 0 && y < n && x < n && (bits[(y * n + x) >> 3] >> (7 - (y * n + x) % 8) & 1) === 1, parts = [];
  for (let y = 0; y <= n; y++) for (let x = 0; x <= n; x++) {
    if (on(y, x) !== on(y - 1, x)) parts.push(`M${x} ${y}h1`);
    if (on(y, x) !== on(y, x - 1)) parts.push(`M${x} ${y}v1`);
  }
  return parts.join("");
}

function svg(tag, attributes, ...inside) {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  e.append(...inside);
  return e;
}

const PATIENCE = 20000; // milliseconds until it is said that no answer comes

class Explorer {
  constructor(model, el) {
    this.model = model;
    this.id = Math.random().toString(36).slice(2); // the same widget may be shown twice
    this.state = {};
    this.asked = 0; this.waiting = false; this.next = null;
    this.root = make("section", {class: "se-explorer", "aria-label": "Explorer of attention maps"});
    el.append(this.root);
    this.build();
    this.hear = answer => this.answered(answer);
    model.on("msg:custom", this.hear);
    this.ask({kind: "view"});
  }

  // --- questions and answers: one at a time, and of those that wait only the latest

  ask(message) {
    if (this.waiting && message.kind === "view") { this.next = message; return; }
    this.waiting = true;
    this.asked += 1;
    this.began = performance.now();
    this.root.setAttribute("aria-busy", "true");
    clearTimeout(this.late);
    this.late = setTimeout(() => this.unanswered(), PATIENCE);
    this.model.send({state: this.state, ...message, n: `${this.id} ${this.asked}`});
  }

  unanswered() { // Python is at work on something else, or gone; the next question is sent all the same
    this.waiting = false; this.next = null; this.wanted = null;
    this.root.removeAttribute("aria-busy");
    this.fail("no answer from Python yet: it is busy, or it was restarted; then run the cell again");
  }

  close() { // the view is gone, the widget may stay
    clearTimeout(this.late);
    this.model.off?.("msg:custom", this.hear);
  }

  set(change) {
    this.wanted = {...(this.wanted ?? this.state), ...change};
    this.ask({kind: "view", state: this.wanted});
  }

  answered(answer) {
    if (answer.n !== `${this.id} ${this.asked}`) return;
    clearTimeout(this.late);
    this.waiting = false;
    if (this.next) { const next = this.next; this.next = null; this.ask(next); }
    else { this.wanted = null; this.root.removeAttribute("aria-busy"); }
    if (answer.kind === "error") this.fail(answer.said);
    if (answer.kind === "file") this.save(answer);
    if (answer.kind === "view") { this.fail(""); this.show(answer); }
  }

  fail(said) {
    this.error.textContent = said;
    this.error.hidden = !said;
    if (said) this.fill();
  }

  save({name, data}) {
    const link = make("a", {download: name, href: URL.createObjectURL(new Blob([bytes(data)]))});
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  // --- what stays: the controls

  build() {
    const field = (label, input) => make("label", {}, make("span", {}, label), input);
    const pick = (name, key, read = Number) => this[name] = make("select",
      {name, onchange: e => this.set({[key]: read(e.target.value)})});
    pick("picture", "picture");
    pick("query", "query", v => v);
    pick("sort", "sort", v => v);
    pick("connectivity", "connectivity");
    for (const [v, text] of [["auto", "what the classifier reads"], ["cls", "[CLS]"], ["mean", "mean of the patches"]])
      this.query.append(make("option", {value: v}, text));
    this.onePatch = make("option", {value: "patch", disabled: true}, "a patch");
    this.query.append(this.onePatch);
    for (const [v, text] of [["entropy", "E"], ["difference", "E less chance"], ["overlap", "overlap with the object"], ["head", "number"]])
      this.sort.append(make("option", {value: v}, text));
    for (const v of [8, 4]) this.connectivity.append(make("option", {value: v}, `${v} neighbours`));
    this.kind = make("select", {name: "kind", onchange: () => this.threshold()},
      make("option", {value: "mean"}, "above k × mean"), make("option", {value: "mass"}, "share of attention"));
    this.level = make("input", {type: "range", name: "level", oninput: () => this.threshold(false)});
    this.levelSaid = make("output", {});
    this.file = make("input", {type: "file", accept: "image/*", name: "file", onchange: () => this.drop(this.file.files)});
    this.error = make("p", {class: "se-error", role: "alert", hidden: true});
    this.sides = make("div", {class: "se-sides"});
    this.live = make("p", {class: "se-live", "aria-live": "polite"});
    const out = (what, label) => make("button", {type: "button", name: what, onclick: () => this.ask({kind: "export", what})}, label);
    const step = (name, by, label) => make("button", {type: "button", name, "aria-label": label, onclick: () => this.step(by)}, by < 0 ? "‹" : "›");
    this.codeText = make("pre", {tabindex: 0, "aria-label": "Python that leads to these numbers"});
    this.root.append(
      make("form", {class: "se-controls", onsubmit: e => e.preventDefault()},
        make("div", {class: "se-field"}, field("Picture", this.picture), step("before", -1, "picture before"), step("after", 1, "next picture")),
        field("Asked by", this.query), field("Threshold", this.kind),
        make("div", {class: "se-field se-level"}, field("Level", this.level), this.levelSaid),
        field("Connectivity", this.connectivity), field("Heads by", this.sort), field("Add a picture (or drop it)", this.file)),
      this.error, this.sides, this.live,
      make("div", {class: "se-exports"}, make("span", {}, "Save "), out("png", "figure .png"), out("svg", "figure .svg"),
        out("json", "numbers .json"), out("py", "code .py")),
      make("details", {}, make("summary", {}, "The lines that lead to these numbers"), this.codeText),
      make("p", {class: "se-help"}, "Click a patch of the picture to let it ask, or focus the picture and use the arrow keys; Escape gives the query back. ",
        "Heads are buttons; [ and ] choose the block, , and . the picture."));
    this.root.addEventListener("keydown", e => this.key(e));
    this.root.addEventListener("dragover", e => e.preventDefault());
    this.root.addEventListener("drop", e => { e.preventDefault(); this.drop(e.dataTransfer.files); });
  }

  step(by) {
    const n = this.view.pictures.length, at = (this.wanted ?? this.state).picture;
    this.set({picture: (at + by + n) % n});
  }

  threshold(fresh = true) {
    const mass = this.kind.value === "mass";
    if (fresh) this.range(mass, mass ? .6 : 1);
    const v = Number(this.level.value);
    this.levelSaid.textContent = mass ? percent(v) : `k = ${v.toFixed(2)}`;
    this.set(mass ? {mass: v, times_mean: 1} : {mass: null, times_mean: v});
  }

  range(mass, value) {
    const [low, high, step] = mass ? [.02, 1, .02] : [0, 4, .05];
    Object.assign(this.level, {min: low, max: high, step});
    this.level.value = value;
    this.level.setAttribute("aria-valuetext", mass ? percent(value) : `${value} times the mean`);
    this.levelSaid.textContent = mass ? percent(value) : `k = ${value.toFixed(2)}`;
  }

  async drop(files) {
    for (const file of files) {
      const data = new Uint8Array(await file.arrayBuffer());
      let text = "";
      for (let i = 0; i < data.length; i += 32768) text += String.fromCharCode(...data.subarray(i, i + 32768));
      this.ask({kind: "picture", name: file.name, data: btoa(text)});
    }
  }

  key(e) {
    if (e.target.closest("select, input, pre")) return;
    const [h, w] = this.view.sides[0].grid, at = this.state.query;
    const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
    if (e.key === "Escape") this.set({query: "auto"});
    else if (e.key === "[" || e.key === "]") this.block(null, e.key === "]" ? 1 : -1);
    else if (e.key === "," || e.key === ".") this.step(e.key === "." ? 1 : -1);
    else if (moves[e.key] && e.target.classList.contains("se-picture")) {
      const [y, x] = Array.isArray(at) ? at : [Math.floor(h / 2), Math.floor(w / 2)], [dy, dx] = moves[e.key];
      this.set({query: [Math.min(Math.max(y + dy, 0), h - 1), Math.min(Math.max(x + dx, 0), w - 1)]});
    } else return;
    e.preventDefault();
  }

  of(name, i) { const v = (this.wanted ?? this.state)[name]; return Array.isArray(v) ? v[i] : v; }

  pair(name, i, value) { // a choice for one model, or for the only one
    if (this.view.sides.length === 1) return value;
    const both = [0, 1].map(k => k === i ? value : this.view.sides[k][name]);
    return both[0] === both[1] ? both[0] : both;
  }

  block(i, by) { // for one model, or for all where i is null
    const next = this.view.sides.map((s, k) => i === null || i === k ? Math.min(Math.max(s.block + by, 0), s.blocks - 1) : s.block);
    this.set({block: next.length === 1 ? next[0] : next});
  }

  // --- what changes: the view

  fill() { // the controls show the state
    const s = this.view?.state;
    if (!s) return;
    if (this.picture.length !== this.view.pictures.length)
      this.picture.replaceChildren(...this.view.pictures.map((name, i) => make("option", {value: i}, name)));
    this.picture.value = s.picture;
    this.query.value = Array.isArray(s.query) ? "patch" : s.query;
    this.onePatch.textContent = Array.isArray(s.query) ? `the patch (${s.query.join(", ")})` : "a patch: click one";
    this.sort.value = s.sort;
    this.sort.querySelector("[value=overlap]").disabled = !this.view.mask;
    this.connectivity.value = s.connectivity;
    this.kind.value = s.mass === null ? "mean" : "mass";
    if (document.activeElement !== this.level || !this.waiting) this.range(s.mass !== null, s.mass ?? s.times_mean);
  }

  show(view) {
    this.view = view;
    this.state = view.state;
    this.fill();
    if (this.sides.children.length !== view.sides.length) this.sides.replaceChildren(...view.sides.map((_, i) => this.side(i)));
    view.sides.forEach((side, i) => this.fillSide(this.sides.children[i], side, i));
    this.codeText.textContent = view.code;
    this.live.textContent = view.sides.map(s => `${s.name}, block ${s.block}, head ${s.head}: E ${number(s.entropy)}, chance ${number(s.chance)}, ${s.regions} regions.`).join(" ");
    this.root.dataset.milliseconds = (performance.now() - this.began).toFixed(1);
    this.root.dataset.n = this.asked;
  }

  side(i) {
    const panel = (label, ...inside) => make("figure", {}, make("div", {class: "se-panel"}, ...inside), make("figcaption", {}, label));
    const over = () => svg("svg", {class: "se-over", preserveAspectRatio: "none", "aria-hidden": "true"});
    const picture = make("div", {class: "se-picture", tabindex: 0, role: "img", onclick: e => this.click(e, i)}, make("img", {alt: "", draggable: "false"}), over());
    const e = make("article", {class: "se-side"},
      make("h3", {}), make("label", {class: "se-block"}, make("span", {}, "Block"),
        make("select", {name: `block${i}`, onchange: e => this.set({block: this.pair("block", i, Number(e.target.value))})})),
      make("div", {class: "se-panels"}, panel("picture", picture),
        panel("map", make("canvas", {role: "img", class: "se-map", onmousemove: e => this.read(e, i), onmouseleave: () => this.read(null, i)})),
        panel("regions", make("canvas", {role: "img", class: "se-regions"}), over())),
      make("dl", {class: "se-numbers"}), make("div", {class: "se-heads", role: "group", "aria-label": "heads, best first"}));
    return e;
  }

  click(e, i) {
    const box = e.currentTarget.getBoundingClientRect(), [h, w] = this.view.sides[i].grid;
    const at = (v, n) => Math.min(Math.max(Math.floor(v * n), 0), n - 1);
    this.set({query: [at((e.clientY - box.top) / box.height, h), at((e.clientX - box.left) / box.width, w)]});
  }

  read(e, i) { // the value under the pointer
    const side = this.view.sides[i], caption = this.sides.children[i].querySelectorAll("figcaption")[1];
    if (!e) { caption.textContent = "map"; return; }
    const box = e.target.getBoundingClientRect(), [h, w] = side.grid;
    const y = Math.min(Math.floor((e.clientY - box.top) / box.height * h), h - 1), x = Math.min(Math.floor((e.clientX - box.left) / box.width * w), w - 1);
    caption.textContent = `(${y}, ${x}): ${side.map[y]?.[x] ?? "–"}`;
  }

  fillSide(e, side, i) {
    const view = this.view, [h, w] = side.grid, [over, names] = e.querySelectorAll("svg");
    e.querySelector("h3").textContent = side.name;
    const block = e.querySelector("select");
    if (block.length !== side.blocks) block.replaceChildren(...Array.from({length: side.blocks}, (_, b) => make("option", {value: b}, `${b} of 0–${side.blocks - 1}`)));
    block.value = side.block;
    const img = e.querySelector("img");
    if (img.src !== view.image) img.src = view.image;
    this.over(over, side, h, w);
    e.querySelector(".se-picture").setAttribute("aria-label", `${view.pictures[view.state.picture]}; asked by ${this.query.selectedOptions[0]?.textContent}; arrow keys move the patch`);
    const map = e.querySelector(".se-map"), regions = e.querySelector(".se-regions");
    paintMap(map, side.grid, bytes(side.pictures[side.head]));
    map.setAttribute("aria-label", `map of head ${side.head}, ${h} by ${w} patches`);
    paintRegions(regions, side.labels, view.colors);
    regions.setAttribute("aria-label", `${side.regions} regions with the masses ${side.shares.map(percent).join(", ") || "none"}`);
    this.masses(names, side, h, w);
    this.numbers(e.querySelector("dl"), side);
    this.heads(e.querySelector(".se-heads"), side, i);
  }

  over(over, side, h, w) { // the object's outline, and the patch that asks
    const view = this.view, q = view.state.query;
    over.replaceChildren();
    if (view.mask) over.append(svg("path", {d: outline(bytes(view.mask)), transform: `scale(${1 / OUTLINE})`, class: "se-outline"}));
    if (Array.isArray(q)) over.append(svg("rect", {x: q[1] / w, y: q[0] / h, width: 1 / w, height: 1 / h, class: "se-asks"}));
    over.setAttribute("viewBox", "0 0 1 1");
  }

  masses(names, side, h, w) { // in the middle of each region that holds 2 % and more
    names.setAttribute("viewBox", `0 0 ${w} ${h}`);
    names.replaceChildren();
    side.shares.forEach((share, k) => {
      if (share < .02) return;
      let n = 0, sy = 0, sx = 0;
      side.labels.forEach((row, y) => row.forEach((v, x) => { if (v === k + 1) { n++; sy += y + .5; sx += x + .5; } }));
      names.append(svg("text", {x: sx / n, y: sy / n - (n < 6 ? 1.1 : 0), "font-size": h / 15}, share.toFixed(2)));
    });
  }

  numbers(list, side) {
    const rows = [["E", number(side.entropy), "entropy"], ["by chance", `${number(side.chance)} ± ${number(side.spread)}`, "chance"],
      ["difference", number(side.difference), "difference"], ["regions", `${side.regions ?? "–"}`, "regions"], ["cells", percent(side.density), "density"]];
    if ("jaccard" in side) rows.push(["Jaccard", number(side.jaccard, 2), "jaccard"], ["pixel AUC", number(side.pixel_auc, 2), "pixel_auc"],
      ["mass on the object", percent(side.energy_pointing), "energy_pointing"]);
    list.replaceChildren(...rows.map(([name, text, key]) => make("div", {}, make("dt", {}, name), make("dd", {"data-of": key, "data-value": side[key] ?? ""}, text))));
  }

  heads(group, side, i) {
    if (group.children.length !== side.heads.length)
      group.replaceChildren(...side.heads.map(() => make("button", {type: "button"}, make("canvas", {"aria-hidden": "true"}), make("span", {}))));
    side.heads.forEach((row, k) => {
      const b = group.children[k], chosen = row.head === side.head;
      const by = {difference: row.difference, overlap: row.jaccard}[this.state.sort] ?? row.entropy;
      b.onclick = () => this.set({head: this.pair("head", i, row.head)});
      b.setAttribute("aria-pressed", chosen);
      b.setAttribute("aria-label", `head ${row.head}: E ${number(row.entropy)}, chance ${number(row.chance)}`);
      b.dataset.head = row.head;
      paintMap(b.querySelector("canvas"), side.grid, bytes(side.pictures[row.head]));
      b.querySelector("span").textContent = `${row.head}: ${number(by, 2)}`;
    });
  }
}

function render({model, el}) {
  const explorer = new Explorer(model, el);
  return () => explorer.close();
}

export default {render};
