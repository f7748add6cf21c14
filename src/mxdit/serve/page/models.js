// Models, their modes, and requests that are made once more.

import * as api from "./api.js";

const MODES = {
  none: "BF16",
  mxfp4: "MXFP4",
  mxfp4_dualscale: "MXFP4 dual scale",
  mxfp8: "MXFP8",
};

// Fields of a request; those of the second list only where the model's `takes` has them.
const ALWAYS = ["prompt", "num_inference_steps", "seed", "fps", "flow_shift"];
export const TAKEN = [
  "negative_prompt", "size", "num_frames", "guidance_scale", "guidance_scale_2", "boundary_ratio",
];

export const modeName = (mode) => MODES[mode] ?? mode;

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
  const names = [...ALWAYS, ...TAKEN.filter((name) => model.takes.includes(name))];
  const fields = { model: model.id };
  for (const name of names) {
    if (given[name] !== null && given[name] !== undefined && given[name] !== "") {
      fields[name] = given[name];
    }
  }
  if (given.activation_steps) fields.extra_params = { activation_steps: given.activation_steps };
  const image = given.has_image ? await api.firstFrame(video.id) : null;
  return api.create(fields, image);
}
