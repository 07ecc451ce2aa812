// Tokens per second during the last two minutes.

import { colour, prepare } from "./format.js";

const SAMPLES = 240;
const HEIGHT = 30;
/** Narrower on a phone, where it stands beside another figure. */
const width = () => (window.innerWidth < 500 ? 110 : 150);

export class Sparkline {
  #samples = [];

  constructor(canvas) {
    this.canvas = canvas;
  }

  add(speed) {
    this.#samples.push(speed ?? 0);
    if (this.#samples.length > SAMPLES) this.#samples.shift();
    this.draw();
  }

  draw() {
    const across = width();
    const context = prepare(this.canvas, across, HEIGHT);
    const most = Math.max(1, ...this.#samples);
    const step = across / (SAMPLES - 1);
    const left = across - (this.#samples.length - 1) * step;
    const y = (speed) => HEIGHT - 2 - (speed / most) * (HEIGHT - 5);
    context.strokeStyle = colour("line");
    context.beginPath();
    context.moveTo(0, HEIGHT - 1.5);
    context.lineTo(across, HEIGHT - 1.5);
    context.stroke();
    context.beginPath();
    this.#samples.forEach((speed, i) => context.lineTo(left + i * step, y(speed)));
    context.strokeStyle = colour("accent");
    context.lineWidth = 1.6;
    context.lineJoin = "round";
    context.stroke();
    context.lineTo(across, HEIGHT - 2);
    context.lineTo(left, HEIGHT - 2);
    context.globalAlpha = 0.16;
    context.fillStyle = colour("accent");
    context.fill();
    context.globalAlpha = 1;
    this.canvas.setAttribute("aria-label", `Tokens per second during the last two minutes, at most ${most.toFixed(0)}`);
  }
}
