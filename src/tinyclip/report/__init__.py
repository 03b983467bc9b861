"""Pages of HTML on what runs and models have achieved: `runs` reads the folders of runs, `comparison` what
`evaluate.compare` found; both are put together from the pieces in `html`.

Imports evaluate, teachers and what is below them. Begin with `runs`."""
