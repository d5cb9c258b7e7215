"""The envelope: pure maths on tensors, independent of models.

`operators` has the function and its proximal operators as functions of group norms; `root` has the
scalar equation behind them and two ways to solve it.
"""
