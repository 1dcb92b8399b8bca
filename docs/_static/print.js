// On paper nothing can be opened, and the ground is white
addEventListener("beforeprint", () => {
  const root = document.documentElement;
  [root.dataset.screen, root.dataset.theme] = [root.dataset.theme, "light"];
  for (const folded of document.querySelectorAll("details:not([open])")) {
    folded.open = true;
    folded.dataset.folded = "";
  }
});
addEventListener("afterprint", () => {
  document.documentElement.dataset.theme = document.documentElement.dataset.screen;
  for (const details of document.querySelectorAll("details[data-folded]")) {
    details.open = false;
    delete details.dataset.folded;
  }
});
