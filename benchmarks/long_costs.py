class Sizes: pass
def measure_costs(*a): raise NotImplementedError
