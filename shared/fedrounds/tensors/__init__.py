"""Tensors as entries of a state_dict, as bytes and as payloads."""
