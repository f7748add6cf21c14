// Models, their modes, and requests that are made once more.

import * as api from "./api.js";

const MODES = {
  none: "as stored",
  mxfp4: "MXFP4",
  mxfp4_dualscale: "MXFP4 dual scale",
  mxfp8: "MXFP8",
};

/** Fields of a request but for its model and first frame. */
export const FIELDS = [
  "prompt", "negative_prompt", "size", "num_frames", "num_inference_steps", "guidance_scale",
  "guidance_scale_2", "seed", "fps", "flow_shift", "boundary_ratio",
];

/** Whether a request for a model may have this field. */
export function offers(model, name) {
  if (["prompt", "num_inference_steps", "seed"].includes(name)) return true;
  if (name === "fps") return model.takes.includes("num_frames"); // an image has none
  if (name === "flow_shift") return model.defaults.flow_shift !== null;
  return model.takes.includes(name);
}

/** Whether a first frame is asked for: an engine may not say what its model makes, and then may have one. */
export const takesFrame = (model) =>
  model.task === "i2v" || (model.task === null && model.takes.includes("input_reference"));

export const modeName = (mode) => MODES[mode] ?? mode;

/** What the linears of a model run as, in words. */
export function linearsOf({ loaded, experts }) {
  if (!loaded) return "Loaded with its first job.";
  if (!experts) return "On an engine, which does not say what its linears run as.";
  const kinds = Object.entries(experts).map(([name, counts]) => [name,
    Object.entries(counts).map(([kind, count]) => `${count} ${kind}`).join(", ")]);
  const same = kinds.every(([, text]) => text === kinds[0][1]);
  if (!same) return kinds.map(([name, text]) => `Linears of ${name}: ${text}.`).join(" ");
  return `Linears${kinds.length > 1 ? " of each transformer" : ""}: ${kinds[0][1]}.`;
}

/** How else a model computes, in words; none where that is as always, or an engine's affair. */
export function methodsOf({ attention, compile, fused }) {
  const said = attention && attention !== "torch" ? [`attention in ${attention}`] : [];
  if (fused) said.push("fused norms, rotary embeddings and GELU");
  if (compile) said.push("compiled blocks");
  return said.length ? `With ${said.join(", ")}.` : "";
}

/** Equal for two lists that offer the same; what is loaded does not count. */
export function offerOf(models) {
  return JSON.stringify(models.map(({ id, name, mode, task }) => [id, name, mode, task]));
}

/** Models by name, in the order in which the server has them. */
export function byName(models) {
  const groups = new Map();
  for (const model of models) {
    if (!groups.has(model.name)) groups.set(model.name, []);
    groups.get(model.name).push(model);
  }
  return groups;
}

export function titleOf(models, id) {
  const model = models.find((one) => one.id === id);
  return model ? `${model.name} · ${modeName(model.mode)}` : id;
}

/** What a video can be made with again: a failed one also as it was. */
export function choicesFor(models, video) {
  const own = models.find((model) => model.id === video.model);
  if (!own) return [];
  const others = models.filter((model) => model.name === own.name && model !== own);
  return video.status === "failed" ? [own, ...others] : others;
}

/** Ask for a video with the parameters of another one, its seed too. */
export async function makeAgain(video, model) {
  const given = video.parameters;
  const fields = { model: model.id };
  for (const name of FIELDS.filter((one) => offers(model, one))) {
    if (given[name] !== null && given[name] !== undefined && given[name] !== "") {
      fields[name] = given[name];
    }
  }
  if (given.activation_steps) fields.extra_params = { activation_steps: given.activation_steps };
  const image = given.has_image ? await api.firstFrame(video.id) : null;
  return api.create(fields, image);
}
