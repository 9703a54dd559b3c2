"""Maximal affine subgraphs: what each node is as an affine function of an earlier value, and the cheapest way to it.

``maps`` is the algebra, ``steps`` reads operators as maps, ``forms`` composes them along the graph, ``cover``
chooses. What is chosen becomes nodes in :mod:`optpass.rewrite.affine`.
"""
