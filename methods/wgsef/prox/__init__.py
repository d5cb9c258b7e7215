"""The envelope: pure maths on tensors, independent of models.

`value` holds the function, `prox` its operators on group norms, `tensors` the same on weights in
place, `elementwise` the operator in a metric that varies inside groups. `newton`, `selection` and
`sorting` are three ways to solve the scalar equation of `budget`.
"""
