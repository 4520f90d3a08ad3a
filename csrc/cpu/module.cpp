#include "../module.h"

FCOS_EMPTY_MODULE(_C)
