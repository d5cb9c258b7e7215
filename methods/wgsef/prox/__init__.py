"""The envelope: pure maths on tensors, independent of models.

`operators` holds the function and its proximal operators on group norms, and `root` the scalar
equation behind them with two ways to solve it.
"""
