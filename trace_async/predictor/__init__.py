"""V(H): the value model that steers the allocation, and how good it is. Imports packing, policy, method and trees."""
