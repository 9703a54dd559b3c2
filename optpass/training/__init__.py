"""What training needs beside the model: modules and functions that run while weights are learned."""
