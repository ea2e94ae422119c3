// A drawing that scrolls can be scrolled with the keyboard too.
function reach() {
  for (const box of document.querySelectorAll("figure"))
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
}
addEventListener("load", () => {
  const seen = new ResizeObserver(reach); // a sidebar changes a box as a window does
  for (const box of document.querySelectorAll("figure")) seen.observe(box);
});
