"""Plans: a format for each layer, chosen by what each layer costs in measured divergence."""
