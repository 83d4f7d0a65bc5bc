"""A model of accelerators for few bits (MixPE): modelled cycles and energy of a network's layers, nothing measured."""
