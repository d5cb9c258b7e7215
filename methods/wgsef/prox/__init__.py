"""The envelope: pure maths on tensors, independent of models.

`value` holds the function, `operators` its proximal operators on group norms, and `root` the scalar
equation behind both with two ways to solve it.
"""
