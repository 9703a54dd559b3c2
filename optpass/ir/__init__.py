"""What is being optimised: program, graph, weights, loop."""
