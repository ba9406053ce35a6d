"""All compiled code: functions of plain arrays, independent of the classes of algorithms.

NaN semantics are IEEE (no fastmath), so a diverging case stays visible.
Shapes: d directions, n state coordinates, m noise columns, s kinds of step, T steps, R replicas.
Arrays are float64 unless a type is stated.
"""
