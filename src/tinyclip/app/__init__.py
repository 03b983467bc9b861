"""The page of `tinyclip app` (`page`), and what stands before it: who may ask for what (`guard`, `door`), and the
server (`serving`).

Imports search and what is below it. Begin with `page`."""
