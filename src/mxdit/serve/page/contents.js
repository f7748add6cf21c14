// Files of videos as object URLs, each fetched once and kept until its video is removed.

import * as api from "./api.js";

const urls = new Map();

export function urlOf(id) {
  if (!urls.has(id)) {
    const url = api.content(id).then((blob) => URL.createObjectURL(blob));
    urls.set(id, url);
    url.catch(() => urls.delete(id)); // the next one to ask tries again
  }
  return urls.get(id);
}

export function release(id) {
  urls.get(id)?.then((url) => URL.revokeObjectURL(url), () => {});
  urls.delete(id);
}

export const isStill = (video) => video.media_type.startsWith("image/");

/** A name for a video's file. */
export function fileName(video) {
  const model = video.model.replace(/[^\w.-]+/g, "-");
  const ending = isStill(video) ? "png" : "mp4";
  return `${model}-seed${video.parameters.seed}-${video.id.slice(-6)}.${ending}`;
}
