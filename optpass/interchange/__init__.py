"""A graph in other forms and back: exported programs, saved Programs, ONNX files."""
