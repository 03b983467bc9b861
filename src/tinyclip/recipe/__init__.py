"""A run as data: a YAML file that says everything of it (`recipe`), its stages (`stage`), the shape of a student
relative to its teacher (`student_shape`).

Imports common, inputs and model. Begin with `recipe`."""
