// An importable Python module without contents: importing it loads the library, whose static
// initialisers register the operators.
#pragma once

#include <Python.h>

#define FCOS_EMPTY_MODULE(name)                                                                 \
  PyMODINIT_FUNC PyInit_##name() {                                                              \
    static PyModuleDef definition = {                                                           \
        PyModuleDef_HEAD_INIT, #name, nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr}; \
    return PyModule_Create(&definition);                                                        \
  }
