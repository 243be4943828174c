def best_levels(*a): raise NotImplementedError
