#include "stderr_text.h"

#include <unistd.h>

#include <cstdio>
#include <stdexcept>

namespace vattn::test {
namespace {

class Redirect {
 public:
  Redirect() : file_(std::tmpfile()), saved_(dup(STDERR_FILENO)) {
    if (file_ == nullptr || saved_ < 0) throw std::runtime_error("no temporary file for stderr");
    std::fflush(stderr);
    dup2(fileno(file_), STDERR_FILENO);
  }
  ~Redirect() {
    restore();
    std::fclose(file_);
  }
  Redirect(const Redirect&) = delete;
  Redirect& operator=(const Redirect&) = delete;

  std::string text() {
    restore();
    std::string text;
    std::rewind(file_);
    for (int byte = std::fgetc(file_); byte != EOF; byte = std::fgetc(file_)) {
      text += static_cast<char>(byte);
    }
    return text;
  }

 private:
  void restore() {
    if (saved_ < 0) return;
    std::fflush(stderr);
    dup2(saved_, STDERR_FILENO);
    close(saved_);
    saved_ = -1;
  }

  std::FILE* file_;
  int saved_;
};

}  // namespace

std::string stderr_text(const std::function<void()>& body) {
  Redirect redirect;
  body();
  return redirect.text();
}

}  // namespace vattn::test
