#pragma once

#ifdef FCOS_SIMT
#define DYNAMIC_SHARED(type, name) type* const name = simt::dynamic_shared<type>()
#else
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif
