// SPDX-License-Identifier: Apache-2.0
// The only place where memory that comes from Python is checked: element type, rank,
// contiguity and size. Nothing is converted or copied silently.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "kernels/block_norms.h"
#include "simd/bfloat16.h"

namespace pybsp {

namespace py = pybind11;

inline std::string shape_text(const py::array& array) {
  std::string text = "(";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    text += (i ? ", " : "") + std::to_string(array.shape(i));
  }
  return text + (array.ndim() == 1 ? ",)" : ")");
}

inline void check_rank(const py::array& array, const char* name, py::ssize_t rank) {
  if (array.ndim() == rank) return;
  throw std::invalid_argument(std::string(name) + " must have " + std::to_string(rank) +
                              " dimensions; got shape " + shape_text(array));
}

// The element type and rank that `name` must have; TypeError or ValueError otherwise.
template <typename T>
void check_type(const py::array& array, const char* name, py::ssize_t rank) {
  if (!py::dtype::of<T>().is(array.dtype()) &&
      !py::dtype::of<T>().equal(array.dtype())) {
    throw py::type_error(std::string(name) + " must be " +
                         py::str(py::dtype::of<T>()).cast<std::string>() + "; got " +
                         py::str(array.dtype()).cast<std::string>());
  }
  check_rank(array, name, rank);
}

template <typename T>
void check_contiguous(const py::array& array, const char* name, py::ssize_t rank) {
  check_type<T>(array, name, rank);
  if (!(array.flags() & py::array::c_style)) {
    throw std::invalid_argument(std::string(name) + " must be contiguous");
  }
}

template <typename T>
const T* input(const py::array& array, const char* name, py::ssize_t rank) {
  check_contiguous<T>(array, name, rank);
  return static_cast<const T*>(array.data());
}

template <typename T>
T* output(py::array& array, const char* name, py::ssize_t rank) {
  check_contiguous<T>(array, name, rank);
  return static_cast<T*>(array.mutable_data());
}

// Calls body(element) with float{} or Bfloat16{} for what `array` holds: float32, or
// bfloat16 as uint16, which numpy has no name for.
template <typename Body>
auto with_element(const py::array& array, const char* name, Body body) {
  if (py::isinstance<py::array_t<uint16_t>>(array)) return body(Bfloat16{});
  check_type<float>(array, name, array.ndim());
  return body(float{});
}

// Elements between the rows of a matrix whose rows are contiguous.
inline int64_t row_stride(const py::array& array, const char* name) {
  check_rank(array, name, 2);
  const py::ssize_t item = array.itemsize();
  if (array.size() == 0) return array.shape(1);  // strides mean nothing
  const bool rows_contiguous = array.shape(1) <= 1 || array.strides(1) == item;
  const bool forward =
      array.shape(0) <= 1 ||
      (array.strides(0) >= array.shape(1) * item && array.strides(0) % item == 0);
  if (!rows_contiguous || !forward) {
    throw std::invalid_argument(std::string(name) + " must have contiguous rows");
  }
  return array.shape(0) <= 1 ? array.shape(1) : array.strides(0) / item;
}

inline BlockGrid block_grid(const py::array& weight, const char* name,
                            int64_t block_rows, int64_t block_cols) {
  const int64_t stride = row_stride(weight, name);
  if (block_rows < 1 || block_cols < 1 || weight.shape(0) % block_rows ||
      weight.shape(1) % block_cols) {
    throw std::invalid_argument("block shape (" + std::to_string(block_rows) + ", " +
                                std::to_string(block_cols) + ") does not divide " +
                                name + " of shape " + shape_text(weight));
  }
  return {weight.shape(0) / block_rows, weight.shape(1) / block_cols, block_rows,
          block_cols, stride};
}

inline void check_per_block(const py::array& array, const char* name,
                            const BlockGrid& grid) {
  if (array.ndim() != 2 || array.shape(0) != grid.grid_rows ||
      array.shape(1) != grid.grid_cols) {
    throw std::invalid_argument(std::string(name) + " must have one entry a block, (" +
                                std::to_string(grid.grid_rows) + ", " +
                                std::to_string(grid.grid_cols) + "); got shape " +
                                shape_text(array));
  }
}

}  // namespace pybsp
