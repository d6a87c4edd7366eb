// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <vector>

#include "bindings/module.h"

namespace py = pybind11;

namespace pybsp {
namespace {

void check_dict(py::handle dict) {
  if (!PyDict_Check(dict.ptr())) throw py::type_error("each must be a dict");
}

#if PY_VERSION_HEX >= 0x030C0000

// Writes to all dictionaries that were ever looked at. Python tells of each before it
// happens, and lets no other thread run in between: who looks at the dictionaries after
// the count looks at them as they are from then on.
uint64_t changes = 0;

int count_change(PyDict_WatchEvent, PyObject*, PyObject*, PyObject*) {
  ++changes;
  return 0;
}

// Without one nothing is known to be unchanged: where Python has handed out all eight,
// and in 3.13.0, which forgets to tell of attributes (CPython issue 125608).
int watcher() {
  static const int id = [] {
    if (Py_Version >> 8 == 0x030D00) return -1;
    const int found = PyDict_AddWatcher(&count_change);
    if (found < 0) PyErr_Clear();
    return found;
  }();
  return id;
}

class DictVersions {
 public:
  explicit DictVersions(const py::list& dicts) {
    for (py::handle dict : dicts) {
      check_dict(dict);
      if (watcher() >= 0 && PyDict_Watch(watcher(), dict.ptr()) < 0) {
        throw py::error_already_set();
      }
    }
    changes_ = changes;
  }

  bool unchanged(const py::list&) const {
    return watcher() >= 0 && changes_ == changes;
  }

 private:
  uint64_t changes_;
};

#else

uint64_t version_of(PyObject* dict) {
  return reinterpret_cast<const PyDictObject*>(dict)->ma_version_tag;
}

class DictVersions {
 public:
  explicit DictVersions(const py::list& dicts) {
    versions_.reserve(dicts.size());
    for (py::handle dict : dicts) {
      check_dict(dict);
      versions_.push_back(version_of(dict.ptr()));
    }
  }

  bool unchanged(const py::list& dicts) const {
    if (dicts.size() != versions_.size()) return false;
    // One line of cache each, and the loads overlap.
    uint64_t difference = 0;
    for (size_t i = 0; i < versions_.size(); ++i) {
      PyObject* const dict = PyList_GET_ITEM(dicts.ptr(), i);
      check_dict(dict);
      difference |= version_of(dict) ^ versions_[i];
    }
    return difference == 0;
  }

 private:
  // Of the dictionaries themselves this is no owner: they may lead back to here, and
  // Python's collector does not see into this object.
  std::vector<uint64_t> versions_;
};

#endif

}  // namespace

void register_dict_versions(py::module_& module) {
  py::class_<DictVersions>(module, "DictVersions")
      .def(py::init<const py::list&>(), py::arg("dicts"))
      .def("unchanged", &DictVersions::unchanged, py::arg("dicts"));
}

}  // namespace pybsp
