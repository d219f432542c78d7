"""One DeepSpeed rank: loss, update, its weights and its state on disk. Imports packing, policy, method and trees."""
