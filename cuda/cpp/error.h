// An exception's text, kept for the caller on this thread.

#pragma once
#include <c10/util/Exception.h>

#include <exception>
#include <string>

inline thread_local std::string ella_last_error;

template <class R, class F>
R ella_guarded(R failed, F work) {
    try {
        return work();
    } catch (const c10::Error& e) {
        ella_last_error = e.what_without_backtrace();
    } catch (const std::exception& e) {
        ella_last_error = e.what();
    } catch (...) {
        ella_last_error = "an exception of no known kind";
    }
    return failed;
}
