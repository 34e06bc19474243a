// What scrolls sideways, such as a long line of code, can be scrolled by key too.
function reach() {
  for (const e of document.querySelectorAll("article pre, .cell_output, .table-wrapper, mjx-container")) {
    if (e.scrollWidth > e.clientWidth) e.tabIndex = 0;
    else e.removeAttribute("tabindex");
  }
}
addEventListener("load", reach);
addEventListener("resize", reach);
