"""GaLore's relatives: what else can be made of a gradient and a subspace of it."""
