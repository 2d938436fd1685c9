"""Other trainers, as far as they decide memory: their kernels, adapters, losses and sharding, recorded like our own."""
