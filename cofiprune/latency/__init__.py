"""Time as a cost: what blocks of each size take on this device, measured, and a model of any shape by their sum."""
