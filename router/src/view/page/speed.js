// Tokens per second during the last two minutes.

import { colour, prepare } from "./format.js";

const SAMPLES = 240;
const [WIDTH, HEIGHT] = [150, 30];

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
    const context = prepare(this.canvas, WIDTH, HEIGHT);
    const most = Math.max(1, ...this.#samples);
    const step = WIDTH / (SAMPLES - 1);
    const left = WIDTH - (this.#samples.length - 1) * step;
    const y = (speed) => HEIGHT - 2 - (speed / most) * (HEIGHT - 5);
    context.strokeStyle = colour("line");
    context.beginPath();
    context.moveTo(0, HEIGHT - 1.5);
    context.lineTo(WIDTH, HEIGHT - 1.5);
    context.stroke();
    context.beginPath();
    this.#samples.forEach((speed, i) => context.lineTo(left + i * step, y(speed)));
    context.strokeStyle = colour("accent");
    context.lineWidth = 1.6;
    context.lineJoin = "round";
    context.stroke();
    context.lineTo(WIDTH, HEIGHT - 2);
    context.lineTo(left, HEIGHT - 2);
    context.globalAlpha = 0.16;
    context.fillStyle = colour("accent");
    context.fill();
    context.globalAlpha = 1;
    this.canvas.setAttribute("aria-label", `Tokens per second during the last two minutes, at most ${most.toFixed(0)}`);
  }
}
