(() => {
  const trace = JSON.parse($("trace").textContent);
  const { ids, layers, heads: H, experts: E, chosen: K, top: N, arrays, maps } = trace;
  const T = ids.length, L = layers.length;
  const state = { view: "attention", token: T - 1, layer: L - 1, head: 0, expert: 0, figure: "out", over: null };
  let data = {}; // the arrays, by name
  let map = null; // of the layer shown: bytes [H, T (T + 1) / 2]

  // ---- tokens and weights ---------------------------------------------------------------------------------------------------

  const text = (id) => (id < 0 ? "NaN" : trace.pieces[id] ?? String(id));
  const glyphs = (id) => text(id).replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥");
  /** What the pointer is over, or else what was chosen. */
  const focus = () => ({ token: state.token, layer: state.layer, ...state.over });

  /** Bytes of the weights that token t gives to tokens 0 to t, in the head shown. */
  function attended(t) {
    const at = state.head * (T * (T + 1)) / 2 + (t * (t + 1)) / 2;
    return map.subarray(at, at + t + 1);
  }

  // ---- what each view shows -------------------------------------------------------------------------------------------------

  const hasExperts = E > 0, hasSinks = "sink" in arrays, hasMaps = maps !== null;
  const FIGURES = {
    out: ["norm", "of the residual stream behind the layer"],
    mid: ["norm, middle", "of the residual stream behind the layer’s attention"],
    entropy: ["entropy", "of attention in nats, mean of the layer’s heads"],
    ...(hasSinks ? { sink: ["sink", "share of attention, mean of the layer’s heads"] } : {}),
  };
  const VIEWS = { attention: "Attention", lens: "Lens", ...(hasExperts ? { routing: "Routing" } : {}), figures: "Figures" };
  const widget = { attention: "prose", routing: "prose", lens: "lens", figures: "figures" };

  const CAPTIONS = {
    attention() {
      const { token } = focus(), at = (state.layer * H + state.head) * T + token;
      const sink = hasSinks ? `, ${percent(data.sink[at])} to the sink` : "";
      const found = `: entropy ${figure(data.entropy[at])} nats${sink}`;
      return [`Layer ${layers[state.layer]}, head ${state.head}`, [map ? "what " : "", make("b", glyphs(ids[token])), map ? " attends to" : "", found]];
    },
    lens: () => ["Logit lens", "what would come next if the model stopped behind a layer; underlined is what does come"],
    routing() {
      const load = data.counts[state.layer * E + state.expert];
      return [`Layer ${layers[state.layer]}, expert ${state.expert}`, `takes ${load} of ${T} tokens, shaded by its weight`];
    },
    figures: () => ["Figures", FIGURES[state.figure][1]],
  };

  // ---- the prompt as it reads -----------------------------------------------------------------------------------------------

  const tokens = ids.map((id, t) => {
    const parts = (trace.pieces[id] ?? `${id} `).split(/(\n)/).map((part) => (part === "\n" ? [make("i", "↵"), "\n"] : part)).flat();
    return make("span.t", parts, { role: "option", id: `t${t}`, "data-token": t });
  });

  function drawProse() {
    const { token } = focus(), routing = state.view === "routing";
    const bytes = !routing && map ? attended(token) : null;
    for (let t = 0; t < T; t++) {
      const amount = routing ? weightOf(state.expert, state.layer, t) : bytes && t <= token ? bytes[t] / 255 : 0;
      shade(tokens[t], amount);
      tokens[t].classList.toggle("unseen", !routing && t > token);
      mark(tokens[t], t === token);
    }
    $("prose").setAttribute("aria-activedescendant", `t${token}`);
  }

  function mark(element, now) {
    element.classList.toggle("now", now);
    if (element.role) element.ariaSelected = now;
  }

  /** How many choices of experts the tokens make in a layer. */
  const sent = (layer) => row(data.counts, E, layer).reduce((sum, count) => sum + count, 0);

  function weightOf(expert, layer, t) {
    const at = (layer * T + t) * K;
    for (let j = 0; j < K; j++) if (data.experts[at + j] === expert) return data.weights[at + j];
    return 0;
  }

  /** The token on the line above or below that is nearest. */
  function lineAway(t, direction) {
    const { left, top, width } = tokens[t].getClientRects()[0], middle = left + width / 2;
    let line = null, best = t, distance = Infinity;
    for (let i = t + direction; i >= 0 && i < T; i += direction) {
      const box = tokens[i].getClientRects()[0];
      if (!box || (box.top - top) * direction < 4) continue;
      if (line === null) line = box.top;
      if (Math.abs(box.top - line) > 4) break;
      const away = Math.abs(box.left + box.width / 2 - middle);
      if (away < distance) [best, distance] = [i, away];
    }
    return best;
  }

  // ---- tables of tokens by layers -------------------------------------------------------------------------------------------

  const cells = {}; // of each table that was drawn: elements [T][L]

  function table(id, wide, fill) {
    const place = $(id), rows = [];
    place.className = "table";
    place.style.setProperty("--n", L);
    place.style.setProperty("--cell", wide);
    const names = ["token", ...layers.map((i) => `layer ${i}`)].map((name) => make("span", name, { role: "columnheader" }));
    const body = make("div.body", "", { role: "rowgroup" });
    for (let t = 0; t < T; t++) {
      const line = layers.map((_, i) => make("div.cell", "", { role: "gridcell", id: `${id}-${t}-${i}`, "data-token": t, "data-layer": i }));
      const name = make("div.name", [make("span", String(t)), make("b", glyphs(ids[t]))], { role: "rowheader", "data-token": t });
      body.append(make("div.row", [name, ...line], { role: "row" }));
      rows.push(line);
    }
    place.replaceChildren(make("div.row.head", names, { role: "row" }), body);
    cells[id] = rows;
    rows.forEach((line, t) => line.forEach((cell, i) => fill(cell, t, i)));
  }

  function drawTable(id) {
    if (id === "lens" && !cells.lens) table(id, "6.5rem", fillLens);
    if (id === "figures" && cells.figures?.of !== state.figure) {
      const scale = scaled(data[state.figure === "entropy" || state.figure === "sink" ? `${state.figure}Mean` : state.figure]);
      table(id, "4.5rem", (cell, t, i) => fillFigure(cell, t, i, scale));
      cells.figures.of = state.figure;
    }
    const { token, layer } = focus(), place = $(id);
    place.querySelectorAll(".now").forEach((element) => mark(element, false));
    mark(cells[id][token][layer], true);
    cells[id][token][layer].parentElement.classList.add("now");
    place.setAttribute("aria-activedescendant", `${id}-${token}-${layer}`);
  }

  function fillLens(cell, t, i) {
    const at = (i * T + t) * N, p = data.lensProbs[at], id = data.lensIds[at];
    cell.append(make("b", glyphs(id)), make("span", percent(p).replace(" %", "")));
    cell.classList.toggle("hit", t + 1 < T && id === ids[t + 1]);
    shade(cell, p);
  }

  function fillFigure(cell, t, i, { values, least, most, log }) {
    const x = values[i * T + t];
    cell.append(state.figure === "sink" ? percent(x) : figure(x));
    cell.classList.add("number");
    shade(cell, 0.85 * (log(x) - least) / (most - least || 1));
  }

  /** The range of an array, in logarithms for norms. */
  function scaled(values) {
    const log = state.figure === "out" || state.figure === "mid" ? (x) => Math.log(Math.max(x, 1e-9)) : (x) => x;
    const finite = Array.from(values).filter(Number.isFinite).map(log);
    return { values, log, least: finite.reduce((a, b) => Math.min(a, b), Infinity), most: finite.reduce((a, b) => Math.max(a, b), -Infinity) };
  }

  // ---- layers by heads, or by experts ---------------------------------------------------------------------------------------

  let picked = ""; // which of the two is drawn

  function drawPicker() {
    const routing = state.view === "routing", n = routing ? E : H, now = routing ? state.expert : state.head;
    const place = $("picker"), wide = clamp((place.parentElement.clientWidth - 44) / n - 2, 2, 40), key = `${state.view} ${wide}`;
    if (picked !== key) {
      picked = key;
      const values = routing ? Array.from(data.counts, (count, i) => count / (sent(Math.floor(i / E)) || 1)) : data.entropyOfHead;
      const most = values.reduce((a, b) => Math.max(a, b), 0);
      place.style.gridTemplateColumns = `max-content repeat(${n}, ${wide}px)`;
      place.style.setProperty("--high", `${clamp(230 / L - 2, 7, 22)}px`);
      place.setAttribute("aria-label", `layers by ${routing ? "experts" : "heads"}`);
      const every = wide < 16 ? 8 : 1;
      const top = Array.from({ length: n }, (_, j) => make("span.axis", j % every ? "" : String(j), { "aria-hidden": "true" }));
      const rows = layers.map((number, i) => {
        const line = Array.from({ length: n }, (_, j) => {
          const value = values[i * n + j], name = `layer ${number}, ${routing ? "expert" : "head"} ${j}`;
          const what = routing ? `${percent(value)} of the choices` : `mean entropy ${figure(value)} nats`;
          const cell = make("div.pick", "", { role: "gridcell", title: `${name}: ${what}`, "aria-label": name, id: `p${i}-${j}`, "data-layer": i, "data-of": j });
          shade(cell, value / (most || 1));
          return cell;
        });
        return make("div", [make("span.axis.left", L > 12 && i % 4 ? "" : String(number), { "aria-hidden": "true" }), ...line], { role: "row" });
      });
      place.replaceChildren(make("span"), ...top, ...rows);
      $("scale").textContent = routing
        ? `Layers by experts, shaded by load: up to ${percent(most)}, ${percent(1 / E)} where all are even.`
        : `Layers by heads, shaded by mean entropy: up to ${figure(most)} nats.`;
    }
    place.querySelectorAll(".now").forEach((element) => mark(element, false));
    mark($(`p${state.layer}-${now}`), true);
    place.setAttribute("aria-activedescendant", `p${state.layer}-${now}`);
  }

  function drawLoads() {
    const counts = row(data.counts, E, state.layer), most = Math.max(...counts) || 1, { token } = focus();
    const bars = Array.from(counts, (count, e) => {
      const bar = make("div.bar.even");
      bar.style.setProperty("--even", sent(state.layer) / E / most);
      shade(bar, count / most);
      const mine = weightOf(e, state.layer, token);
      const line = make("div", [make("span", `expert ${e}`), bar, make("span.value", mine ? [make("span.of", percent(mine)), ` ${count}`] : String(count))]);
      line.dataset.of = e;
      mark(line, e === state.expert);
      return line;
    });
    const imbalance = (most * E) / (sent(state.layer) || 1);
    $("loads").replaceChildren(
      make("div.bars", bars),
      make("p.note", [`Tokens of each expert; the line is an even load. Most over mean: ${imbalance.toFixed(2)}. `, make("span.of", "Orange"), ": where the chosen token goes."]),
    );
  }

  // ---- the map of a head ----------------------------------------------------------------------------------------------------

  const canvas = $("map").querySelector("canvas"), under = document.createElement("canvas");
  let painted = "";

  function drawMap() {
    const key = `${state.layer} ${state.head} ${dark.matches}`;
    if (painted !== key) {
      painted = key;
      const style = getComputedStyle(document.documentElement);
      const [r, g, b] = style.getPropertyValue("--heat").split(" ").map(Number);
      const image = new ImageData(T, T);
      for (let t = 0; t < T; t++) {
        const bytes = attended(t);
        for (let s = 0; s <= t; s++) image.data.set([r, g, b, bytes[s]], 4 * (t * T + s));
      }
      under.width = under.height = T;
      under.getContext("2d").putImageData(image, 0, 0);
    }
    const size = Math.round(canvas.clientWidth * devicePixelRatio) || 1, context = canvas.getContext("2d"), { token } = focus();
    canvas.width = canvas.height = size;
    context.imageSmoothingEnabled = T > size;
    context.drawImage(under, 0, 0, size, size);
    const step = size / T, line = Math.max(1, Math.round(devicePixelRatio));
    context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--mark");
    for (const y of [token * step - line, (token + 1) * step]) context.fillRect(0, y, (token + 1) * step, line);
  }

  function describeMap(key = null) {
    const { token } = focus(), caption = $("map").querySelector("figcaption");
    if (key === null || key > token) caption.textContent = "Rows attend to columns. Shade: the square root of the weight.";
    else caption.textContent = `${token} ${glyphs(ids[token])} attends to ${key} ${glyphs(ids[key])}: ${percent(weight(attended(token)[key]))}`;
  }

  // ---- the token chosen -----------------------------------------------------------------------------------------------------

  function bars(entries) {
    const most = Math.max(...entries.map(([, share]) => share || 0), 1e-9);
    return make("div.bars", entries.map(([name, share, kind]) => {
      const bar = make("div.bar");
      shade(bar, share / most);
      return make(kind ? `div.${kind}` : "div", [make("span.piece", name), bar, make("span.value", percent(share))]);
    }));
  }

  function drawToken() {
    const { token, layer } = focus(), number = layers[layer], parts = [];
    parts.push(make("p.big", glyphs(ids[token])));
    parts.push(make("p.note", `token ${token}, id ${ids[token]}; norm ${figure(data.embed[token])} where it enters`));
    if (state.view === "attention" && map) {
      const found = attended(token), best = argsort(found).slice(0, 6).filter((t) => found[t]);
      const entries = best.map((t) => [`${t} ${glyphs(ids[t])}`, weight(found[t])]);
      if (hasSinks) entries.push(["sink", data.sink[(state.layer * H + state.head) * T + token], "miss"]);
      parts.push(make("h3", ["Attends most to ", make("small", `in layer ${layers[state.layer]}, head ${state.head}`)]), bars(entries));
    } else {
      const at = layer * T + token, likeliest = Array.from({ length: N }, (_, j) => at * N + j);
      const entries = likeliest.map((j) => [glyphs(data.lensIds[j]), data.lensProbs[j], token + 1 < T && data.lensIds[j] === ids[token + 1] ? "miss" : ""]);
      parts.push(make("h3", ["Would come next ", make("small", `behind layer ${number}, entropy ${figure(data.lensEntropy[at])} nats`)]), bars(entries));
      if (token + 1 < T && data.rank[at] > 0) {
        parts.push(make("p.note", `What comes is ${glyphs(ids[token + 1])}: ${percent(data.next[at])}, rank ${data.rank[at]}.`));
      }
    }
    parts.push(make("h3", "Through the layers"), across(token, layer));
    $("token").replaceChildren(...parts);
  }

  /** The layers of a token as a table: in the routing view its experts, elsewhere lens and figures. */
  function across(token, layer) {
    const columns = state.view === "routing"
      ? [["experts", (at) => Array.from({ length: K }, (_, j) => `${data.experts[at * K + j]} (${percent(data.weights[at * K + j])})`).join(", ")]]
      : [
        ["lens", (at) => glyphs(data.lensIds[at * N])],
        ["", (at) => percent(data.lensProbs[at * N])],
        ["norm", (at) => figure(data.out[at])],
        ["entropy", (at) => figure(data.entropyMean[at])],
        ...(hasSinks ? [["sink", (at) => percent(data.sinkMean[at])]] : []),
      ];
    const cell = (tag, content, i) => make(i ? tag : `${tag}.${state.view === "routing" ? "wide" : "piece"}`, content);
    const rows = layers.map((number, i) => {
      const line = make("tr", [make("td", String(number)), ...columns.map(([, value], j) => cell("td", value(i * T + token), j))], { "data-layer": i });
      line.classList.toggle("now", i === layer);
      return line;
    });
    const head = make("tr", [make("th"), ...columns.map(([name], j) => cell("th", name, j))]);
    return make("table.across", [make("thead", head), make("tbody", rows)]);
  }

  // ---- all of it ------------------------------------------------------------------------------------------------------------

  function show(id, shown) {
    $(id).hidden = !shown;
  }

  function draw() {
    const { view } = state, onProse = widget[view] === "prose";
    for (const tab of $("tabs").children) {
      tab.ariaSelected = tab.dataset.view === view;
      tab.tabIndex = tab.dataset.view === view ? 0 : -1;
    }
    for (const id of ["prose", "lens", "figures"]) show(id, widget[view] === id);
    show("control", onProse);
    show("choices", view === "figures");
    show("loads", view === "routing");
    show("map", view === "attention" && map !== null);
    for (const choice of $("choices").children) choice.ariaPressed = choice.dataset.figure === state.figure;
    const [title, subtitle] = CAPTIONS[view]();
    $("title").textContent = title;
    $("subtitle").replaceChildren(...[subtitle].flat());
    document.querySelector("main").dataset.view = view;
    if (onProse) {
      drawProse();
      drawPicker();
      if (view === "routing") drawLoads();
      else if (map) drawMap(), describeMap();
    } else drawTable(view);
    drawToken();
  }

  let queue = Promise.resolve(); // layers' maps are unpacked one after the other
  const unpacked = new Map();

  async function take(layer) {
    if (!unpacked.has(layer)) {
      unpacked.set(layer, await unpack(maps[layer]));
      if (unpacked.size > 4) unpacked.delete(unpacked.keys().next().value);
    }
    return unpacked.get(layer);
  }

  /** Change what is shown. */
  function set(changes) {
    Object.assign(state, changes);
    queue = queue.then(async () => {
      if (hasMaps && state.view === "attention") map = await take(state.layer);
      draw();
    }).catch(fail);
    return queue;
  }

  function fail(error) {
    $("notice").textContent = `This page cannot show its trace: ${error.message}`;
    show("notice", true);
    throw error;
  }

  // ---- mouse ----------------------------------------------------------------------------------------------------------------

  function pointed(event) {
    const element = event.target.closest("[data-token], [data-layer]");
    if (!element || !$("view").contains(element)) return null;
    const { token, layer } = element.dataset;
    return { ...(token && { token: +token }), ...(layer && { layer: +layer }) };
  }

  function over(event) {
    const found = pointed(event);
    if (JSON.stringify(found) !== JSON.stringify(state.over)) set({ over: found });
  }

  $("view").addEventListener("mouseover", over);
  $("view").addEventListener("mouseleave", () => set({ over: null }));
  $("view").addEventListener("click", (event) => {
    const found = pointed(event);
    if (found) set({ ...found, over: null });
  });
  $("picker").addEventListener("click", (event) => {
    const { layer, of } = event.target.dataset;
    if (of) set({ layer: +layer, [state.view === "routing" ? "expert" : "head"]: +of });
  });
  $("loads").addEventListener("click", (event) => {
    const line = event.target.closest("[data-of]");
    if (line) set({ expert: +line.dataset.of });
  });
  $("token").addEventListener("click", (event) => {
    const line = event.target.closest("[data-layer]");
    if (line) set({ layer: +line.dataset.layer });
  });
  $("choices").addEventListener("click", (event) => event.target.dataset.figure && set({ figure: event.target.dataset.figure }));
  $("tabs").addEventListener("click", (event) => event.target.dataset.view && chooseView(event.target.dataset.view));
  $("help").addEventListener("click", () => $("keys").showModal());

  function cellOf(event) {
    const box = canvas.getBoundingClientRect();
    const place = (at, from, size) => clamp(Math.floor(((at - from) / size) * T), 0, T - 1);
    return { token: place(event.clientY, box.top, box.height), key: place(event.clientX, box.left, box.width) };
  }
  canvas.addEventListener("mousemove", (event) => {
    const { token, key } = cellOf(event);
    set({ over: { token } }).then(() => describeMap(key));
  });
  canvas.addEventListener("mouseleave", () => set({ over: null }));
  canvas.addEventListener("click", (event) => set({ token: cellOf(event).token, over: null }));

  // ---- keyboard -------------------------------------------------------------------------------------------------------------

  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  const moved = {
    tabs([x]) {
      const names = Object.keys(VIEWS), view = names[(names.indexOf(state.view) + x + names.length) % names.length];
      chooseView(view).then(() => $(`tab-${view}`).focus());
    },
    prose([x, y]) {
      chooseToken(y ? lineAway(state.token, y) : state.token + x);
    },
    picker([x, y]) {
      choose("layer", state.layer + y, L);
      choose(...ofHead(x));
    },
    lens: grid,
    figures: grid,
  };

  function grid([x, y]) {
    choose("layer", state.layer + x, L);
    chooseToken(state.token + y);
  }

  const ofHead = (x) => (state.view === "routing" ? ["expert", state.expert + x, E] : ["head", state.head + x, H]);

  function choose(name, value, count) {
    const next = clamp(value, 0, count - 1);
    if (next !== state[name] || state.over) set({ [name]: next, over: null });
  }

  function chooseToken(value) {
    choose("token", value, T);
    const id = widget[state.view];
    queue.then(() => (id === "prose" ? tokens[state.token] : cells[id][state.token][state.layer]).scrollIntoView({ block: "nearest", inline: "nearest" }));
  }

  async function chooseView(view) {
    await set({ view, over: null });
    const place = $(widget[view]), line = cells[widget[view]]?.[state.token][0].parentElement;
    if (line) place.scrollTop = line.offsetTop - place.offsetTop - place.clientHeight / 2;
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
    const views = Object.keys(VIEWS), place = document.activeElement?.closest("#tabs, #prose, #picker, #lens, #figures");
    const actions = {
      "?": () => $("keys").showModal(),
      w: () => choose("layer", state.layer - 1, L),
      s: () => choose("layer", state.layer + 1, L),
      a: () => choose(...ofHead(-1)),
      d: () => choose(...ofHead(1)),
      home: () => chooseToken(0),
      end: () => chooseToken(T - 1),
    };
    const key = event.key, move = ARROWS[key], digit = views[+key - 1];
    const action = move ? () => moved[place?.id ?? widget[state.view]](move) : digit ? () => chooseView(digit) : actions[key.toLowerCase()];
    if (!action) return;
    event.preventDefault();
    action();
  });

  // ---- the beginning --------------------------------------------------------------------------------------------------------

  /** Means over heads [L, T], and over tokens [L, H], of an array [L, H, T]. */
  function means(values) {
    const byToken = new Float32Array(L * T), byHead = new Float32Array(L * H);
    for (let i = 0; i < L; i++) {
      for (let h = 0; h < H; h++) {
        const line = row(values, T, i * H + h);
        byHead[i * H + h] = mean(line);
        line.forEach((x, t) => (byToken[i * T + t] += x / H));
      }
    }
    return [byToken, byHead];
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");

  async function begin() {
    for (const [name, array] of Object.entries(arrays)) data[name] = await unpack(array);
    [data.entropyMean, data.entropyOfHead] = means(data.entropy);
    if (hasSinks) [data.sinkMean] = means(data.sink);
    $("model").textContent = trace.model;
    $("facts").textContent = trace.facts;
    $("tabs").append(...Object.entries(VIEWS).map(([view, name]) => make("button", name, { role: "tab", type: "button", id: `tab-${view}`, "data-view": view })));
    $("choices").append(...Object.entries(FIGURES).map(([of, [name]]) => make("button", name, { type: "button", "data-figure": of })));
    $("prose").append(...tokens);
    if (trace.notices.length) {
      $("notice").textContent = trace.notices.join(" ");
      show("notice", true);
    }
    dark.addEventListener("change", () => set({}));
    addEventListener("resize", () => set({}));
    await set({});
    document.documentElement.dataset.ready = "yes";
  }

  begin().catch(fail);
})();
