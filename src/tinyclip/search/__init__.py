"""Features of many files. An index of pictures: built by `build`, asked by `index`, drawn by `sheet`. Features as
plain files, for other programs: `embed`.

Imports loading, data and what is below them. Begin with `index`."""
