// A photo by the camera of this device; the button is there only where a camera is.

const $ = (id) => document.getElementById(id);

/** onPhoto(file): async. */
export async function startCamera({ onPhoto, guard }) {
  let stream;

  $("camera-open").addEventListener("click", guard(async () => {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user", width: 1280, height: 960 } });
    $("video").srcObject = stream;
    await $("video").play();
    $("camera").showModal();
  }));
  $("camera").addEventListener("close", () => {
    for (const track of stream.getTracks()) track.stop();
    $("video").srcObject = null;
  });
  $("shoot").addEventListener("click", guard(async () => {
    const canvas = document.createElement("canvas");
    canvas.width = $("video").videoWidth;
    canvas.height = $("video").videoHeight;
    canvas.getContext("2d").drawImage($("video"), 0, 0);
    const photo = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.94));
    $("camera").close();
    await onPhoto(photo);
  }));

  const devices = (await navigator.mediaDevices?.enumerateDevices?.()) ?? [];
  $("camera-open").hidden = !devices.some(({ kind }) => kind === "videoinput");
}
