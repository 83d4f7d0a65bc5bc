"use strict";
// The slider. What it shows is in the address, #left=...&right=...&seed=...&at=..., so that a view can be sent to somebody.
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const rows = new Map([...document.querySelectorAll("#pictures tr[data-model]")].map((row) => [row.dataset.model, row]));
  const labels = [...rows.keys()];
  const view = { left: labels[0], right: labels[1], seed: 0, at: 50, difference: false };

  const picture = (label, seed) => rows.get(label).querySelectorAll("img")[seed];

  async function pixels(image) {
    await image.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const brush = canvas.getContext("2d", { willReadFrequently: true });
    brush.drawImage(image, 0, 0);
    return brush.getImageData(0, 0, canvas.width, canvas.height).data;
  }

  async function psnr(one, other) { // of 8-bit RGB pictures, as the tables have it
    const [a, b] = await Promise.all([pixels(one), pixels(other)]);
    let sum = 0;
    for (let i = 0; i < a.length; i += 4)
      for (let c = i; c < i + 3; c++) sum += (a[c] - b[c]) ** 2;
    return sum ? -10 * Math.log10(sum / (a.length * 0.75 * 255 * 255)) : Infinity;
  }

  function show() {
    const { left, right, seed, at } = view;
    const [one, other] = [picture(left, seed), picture(right, seed)];
    [$("left").value, $("right").value, $("at").value, $("difference").checked] = [left, right, at, view.difference];
    [$("over").src, $("over").alt, $("under").src, $("under").alt] = [one.src, one.alt, other.src, other.alt];
    $("stage").style.setProperty("--at", `${at}%`);
    $("stage").classList.toggle("difference", view.difference);
    $("at").setAttribute("aria-valuetext", `${at} % ${left}, ${100 - at} % ${right}`);
    for (const [side, label] of [["left", left], ["right", right]]) {
      $(`${side}-name`).textContent = $(`${side}-model`).textContent = label;
      $(`${side}-figures`).textContent = data.figures[label][seed].join(" · ") || "full precision";
    }
    $("seed").textContent = data.seeds[seed];
    $("prompt").hidden = !data.prompts;
    $("prompt").textContent = data.prompts ? data.prompts[seed] : "";
    [...$("strip").children].forEach((button, k) => {
      button.setAttribute("aria-pressed", k === seed);
      button.firstChild.src = picture(left, k).src;
    });
    for (const [label, row] of rows)
      row.querySelectorAll("button").forEach((button, k) =>
        button.setAttribute("aria-pressed", k === seed && (label === left || label === right)));
    psnr(one, other).then((value) => {
      if (view.left !== left || view.right !== right || view.seed !== seed) return; // a later look was quicker
      $("between").textContent = value === Infinity ? "identical" : `${value.toFixed(2)} dB`;
    });
  }

  function change(what) {
    Object.assign(view, what);
    show();
    const { left, right, at, difference } = view;
    const address = new URLSearchParams({ left, right, seed: data.seeds[view.seed], at });
    if (difference) address.set("difference", "1");
    try { history.replaceState(null, "", `#${address}`); } catch { /* a frame without an address of its own */ }
  }

  function read() {
    const asked = new URLSearchParams(location.hash.slice(1));
    for (const side of ["left", "right"]) if (rows.has(asked.get(side))) view[side] = asked.get(side);
    const seed = data.seeds.indexOf(Number(asked.get("seed") ?? data.seeds[view.seed]));
    if (seed >= 0) view.seed = seed;
    const at = Number(asked.get("at") ?? view.at);
    if (at >= 0 && at <= 100) view.at = at;
    view.difference = asked.has("difference");
    show();
  }

  data.seeds.forEach((seed, k) => {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `seed ${seed}`);
    button.append(document.createElement("img"));
    button.firstChild.alt = "";
    button.addEventListener("click", () => change({ seed: k }));
    $("strip").append(button);
  });
  const small = () => document.body.classList.toggle("small", picture(labels[0], 0).naturalWidth <= 128);
  picture(labels[0], 0).decode().then(small, small);
  const swap = () => change({ left: view.right, right: view.left });
  const turn = (step) => change({ seed: (view.seed + step + data.seeds.length) % data.seeds.length });
  const flip = () => change({ difference: !view.difference });
  for (const side of ["left", "right"]) $(side).addEventListener("change", (event) => change({ [side]: event.target.value }));
  $("at").addEventListener("input", (event) => change({ at: Number(event.target.value) }));
  $("difference").addEventListener("change", flip);
  $("swap").addEventListener("click", swap);
  for (const [label, row] of rows)
    row.querySelectorAll("button").forEach((button, seed) => button.addEventListener("click", () => {
      change(label === labels[0] ? { seed } : { seed, right: label, left: view.left === label ? labels[0] : view.left });
      $("viewer").scrollIntoView();
      $("at").focus({ preventScroll: true });
    }));
  const keys = { n: () => turn(1), p: () => turn(-1), s: swap, d: flip };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "SELECT") return;
    if (keys[event.key]) keys[event.key]();
  });
  window.addEventListener("hashchange", read);
  read();
})();
